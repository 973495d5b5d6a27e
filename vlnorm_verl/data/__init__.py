"""The paper's data sets as parquet files in verl's schema: from Hugging Face, from local files, or generated.

vlnorm-verl data countdown --out data/countdown      # train.parquet, test.parquet, manifest.json
vlnorm-verl data math --out data/math                # train, math500, aime2024, amc, minerva
vlnorm-verl data countdown --offline                 # generated: the same files without a network

prompts.py     the two prompt templates; pure Python
sources.py     where each set comes from, and how a row of it reads
generate.py    the offline sets
write.py       the schema, and a folder written once, whole, with a manifest
cli.py         the two commands
"""
