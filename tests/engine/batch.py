"""The batch of the exactness programs in numbers; importing them sets no environment variable."""

M = 48.0
ROWS = 16
PROMPT = 5
# Spread over more than 10x, so that a wrong sum cannot pass for rounding.
LENGTHS = [2, 3, 30, 5, 44, 7, 2, 13, 3, 21, 4, 40, 6, 2, 9, 17]
CLIP_LOW, CLIP_HIGH, CLIP_C = 0.2, 0.3, 3.0
VOCAB = 31
