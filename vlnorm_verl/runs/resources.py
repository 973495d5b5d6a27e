"""Memory, time and disk of the GPU recipes, worked out on paper: nothing here was measured.

    python -m vlnorm_verl.runs.resources     the tables of docs/costs.md, as Markdown

Formulas; P parameters, N GPUs, V vocabulary, T tokens of one micro-batch if all its responses are of full length:

    update, GiB a GPU       16 P/N (fp32 parameters, gradients, Adam's moments: verl loads what it offloads meanwhile)
                            + embedding and LM head gathered with gradients + two layers gathered
                            + T · (layer inputs, checkpointed + activations of one layer)
                            + T · V · 2 bytes (bf16 logits), once (flash-attn's cross entropy works in place) or twice
    log-probs, GiB a GPU    4 P/N + gathered as above, no gradients, + activations of one layer
                            + T · V · 2 bytes if torch.compile fuses the entropy, T · V · 10 bytes if not (logits in
                            bf16, softmax and its product with the logits in fp32)
    vLLM's cache            (0.8 · GPU − 2 P − 4 GiB) / (2 · layers · KV heads · head size · 2 bytes), full responses
    host, GiB               12 P offloaded, where a tensor's part on a GPU takes the next power of two (verl offloads to
                            pinned memory, utils/fsdp_utils.py:197, which torch rounds up); or the fp32 model at the
                            start (3B: once a GPU, as verl loads a model with tied embeddings in every process; 7B:
                            once); and 60 to 120 for the processes
    disk, GB                12 P a checkpoint (fp32 parameters, Adam's moments), 4 P of a finished run
    generation, s           waves · (limit · (2 P / bandwidth + overhead) + KV cache read / bandwidth)
    update, s               8 P · tokens / (N · peak · MFU); log-probs 2 P · tokens / (N · peak · MFU)
    link, s                 (8 P in the update + 2 P in log-probs) · (N − 1)/N bytes for each micro-batch of a GPU:
                            FSDP gathers bf16 parameters twice, and reduces fp32 gradients. Under the computation
                            (favourable) or after it

Left out: attention's own FLOPs, offloading (about a second a step), reward, weight sync, checkpoints, validation, what
verl writes of each response, and the network between nodes: there are no hours of a run on several.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from vlnorm_verl.runs.config import parsed
from vlnorm_verl.runs.limits import CHECKPOINT_BYTES, PARAMETERS

GIB, GB = 2**30, 10**9
PROMPTS, MICRO_BATCH = 128, 4
VLLM_SHARE, VLLM_OVERHEAD_GIB = 0.8, 4.0
RESERVE_GIB = 5.0  # CUDA contexts, NCCL, what a sleeping vLLM keeps, fragmentation
ENTROPY_CHUNK_GIB = 5.0  # 2048 tokens · V · 4 bytes · four arrays
# Assumptions, (favourable, unfavourable)
LENGTH_SHARE = (1 / 8, 1 / 2)  # mean response length over the limit
PROMPT_SHARE = 1 / 3  # mean prompt length over its limit
BANDWIDTH_SHARE = (0.8, 0.5)
DECODE_OVERHEAD_S = (0.003, 0.010)  # of one token for all running responses
MFU = (0.4, 0.2)
DAPO_WAVES = (1, 3)  # generated over kept prompts
HOST_PROCESSES_GIB = (60, 120)
PCIE = (20e9, 10e9)  # bytes a second that FSDP's collectives reach a GPU: PCIe 4, 16 lanes


@dataclass(frozen=True)
class Model:
    """Qwen2.5, from its config.json."""

    name: str
    parameters: float
    layers: int
    hidden: int
    intermediate: int
    kv_heads: int
    vocabulary: int
    embeddings: int  # 1 if the LM head is the embedding, else 2
    head_size: int = 128

    @property
    def cache_bytes(self) -> int:
        """Of vLLM's KV cache, for one token."""
        return 2 * self.layers * self.kv_heads * self.head_size * 2

    @property
    def embedding_parameters(self) -> int:
        return self.embeddings * self.vocabulary * self.hidden

    @property
    def layer_parameters(self) -> float:
        return (self.parameters - self.embedding_parameters) / self.layers

    def offloaded_gib(self, gpus: int) -> float:
        """fp32 parameters and Adam's two moments in pinned memory, over all GPUs; biases and norms left out."""
        layer = [self.hidden**2] * 2 + [self.kv_heads * self.head_size * self.hidden] * 2
        layer += [self.intermediate * self.hidden] * 3
        tensors = layer * self.layers + [self.vocabulary * self.hidden] * self.embeddings
        return sum(3 * gpus * 2 ** math.ceil(math.log2(4 * tensor / gpus)) for tensor in tensors) / GIB


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_gib: float
    bandwidth: float  # bytes a second
    peak: float  # dense bf16 FLOP/s
    link: tuple[float, float]  # as PCIE


@dataclass(frozen=True)
class Recipe:
    script: str
    limit: int  # response, tokens
    prompt: int  # limit, tokens
    n: int
    dapo: bool


MODELS = [
    Model("3b", PARAMETERS["3b"], 36, 2048, 11008, 2, 151_936, 1),
    Model("7b", PARAMETERS["7b"], 28, 3584, 18944, 4, 152_064, 2),
]
GPU_TYPES = [
    Gpu("H100 80 GB", 80, 3.35e12, 989e12, (350e9, 200e9)),
    Gpu("A100 80 GB", 80, 2.0e12, 312e12, (230e9, 150e9)),
    Gpu("A100 40 GB", 40, 1.55e12, 312e12, (230e9, 150e9)),
    Gpu("RTX 4090 24 GB", 24, 1.0e12, 165e12, PCIE),
]
NODES = (8, 4)  # GPUs
RECIPES = [
    Recipe("countdown.sh", 3072, 256, 10, False),
    Recipe("countdown.sh", 8192, 256, 10, False),
    Recipe("math.sh", 3072, 1024, 10, False),
    Recipe("math.sh", 8192, 1024, 10, False),
    Recipe("dapo_countdown.sh", 3072, 256, 8, True),
    Recipe("dapo_math.sh", 3072, 1024, 8, True),
]
# What is above of a recipe; a run that is given another one costs something else.
ASSUMED = {
    *("actor_rollout_ref.rollout.n", "data.train_batch_size"),
    *("data.max_prompt_length", "data.max_response_length"),
}
# What to change where a recipe does not fit: name, micro-batch, entropy in chunks. The first that fits is printed.
REMEDIES = [
    ("yes", 4, False),
    ("chunk", 4, True),
    ("micro 2", 2, False),
    ("chunk, micro 2", 2, True),
    ("micro 1", 1, False),
    ("chunk, micro 1", 1, True),
]


def update_gib(model: Model, recipe: Recipe, gpus: int, micro_batch: int) -> tuple[float, float]:
    """The most that a GPU holds in the update, without RESERVE_GIB."""
    tokens = micro_batch * (recipe.prompt + recipe.limit)
    states = 16 * model.parameters / gpus
    # bf16 weights and gradients, and the fp32 copy that is reduced
    gathered = 8 * model.embedding_parameters + 2 * 2 * model.layer_parameters
    kept = 2 * model.hidden * model.layers
    one_layer = 2 * (4 * model.intermediate + 10 * model.hidden)
    logits = 2 * tokens * model.vocabulary
    rest = states + gathered + tokens * (kept + one_layer)
    return (rest + logits) / GIB, (rest + 2 * logits) / GIB


def log_prob_gib(model: Model, recipe: Recipe, gpus: int, micro_batch: int, chunked: bool) -> tuple[float, float]:
    """The most that a GPU holds while the old log-probabilities and entropies are computed, without RESERVE_GIB."""
    tokens = micro_batch * (recipe.prompt + recipe.limit)
    one_layer = 2 * (4 * model.intermediate + 10 * model.hidden)
    rest = 4 * model.parameters / gpus + 2 * model.embedding_parameters + 4 * model.layer_parameters
    rest += tokens * one_layer
    low = rest + 2 * tokens * model.vocabulary
    high = low + (ENTROPY_CHUNK_GIB * GIB if chunked else 8 * tokens * model.vocabulary)
    return low / GIB, high / GIB


def remedy(model: Model, recipe: Recipe, gpu: Gpu, gpus: int) -> tuple[str, int] | None:
    """The name and micro-batch of the first of REMEDIES with which the recipe fits; None if it never does."""
    if cached_responses(model, recipe, gpu) < 1:  # vLLM holds the whole model on each GPU
        return None
    for name, micro_batch, chunked in REMEDIES:
        worst = max(
            update_gib(model, recipe, gpus, micro_batch)[1],
            log_prob_gib(model, recipe, gpus, micro_batch, chunked)[1],
        )
        if worst <= gpu.memory_gib - RESERVE_GIB:
            return name, micro_batch
    return None


def cached_responses(model: Model, recipe: Recipe, gpu: Gpu) -> float:
    """Responses of full length with their prompts that vLLM's KV cache of one GPU holds."""
    room = VLLM_SHARE * gpu.memory_gib * GIB - 2 * model.parameters - VLLM_OVERHEAD_GIB * GIB
    return room / (model.cache_bytes * (recipe.prompt + recipe.limit))


def host_gib(model: Model, gpus: int) -> tuple[float, float]:
    copies = gpus if model.embeddings == 1 else 1
    most = max(model.offloaded_gib(gpus), 4 * copies * model.parameters / GIB)
    return most + HOST_PROCESSES_GIB[0], most + HOST_PROCESSES_GIB[1]


def link_seconds(model: Model, recipe: Recipe, gpus: int, micro_batch: int, bandwidth: float) -> float:
    """FSDP's collectives of one step."""
    micro_batches = PROMPTS * recipe.n / (gpus * micro_batch)
    return micro_batches * (8 + 2) * model.parameters * (gpus - 1) / gpus / bandwidth


def step_seconds(model: Model, recipe: Recipe, gpu: Gpu, gpus: int, micro_batch: int, case: int) -> float:
    """One step; case 0 takes the favourable assumptions, 1 the unfavourable ones."""
    mean, prompt = LENGTH_SHARE[case] * recipe.limit, PROMPT_SHARE * recipe.prompt
    responses = PROMPTS * recipe.n
    waves = DAPO_WAVES[case] if recipe.dapo else 1
    bandwidth = BANDWIDTH_SHARE[case] * gpu.bandwidth
    decode = 2 * model.parameters / bandwidth + DECODE_OVERHEAD_S[case]
    # Each new token reads the cache of its response so far: prompt, and half of the response on average.
    cache_read = responses / gpus * mean * (prompt + mean / 2) * model.cache_bytes
    generation = waves * (recipe.limit * decode + cache_read / bandwidth)
    tokens = responses * (prompt + mean)
    computing = (8 + 2) * model.parameters * tokens / (gpus * gpu.peak * MFU[case])
    link = link_seconds(model, recipe, gpus, micro_batch, gpu.link[case])
    return generation + (max(computing, link) if case == 0 else computing + link)


def run_hours(model: Model, recipe: Recipe, gpu: Gpu, gpus: int, steps: int) -> tuple[float, float] | None:
    """Without validation; None where it does not fit."""
    fitting = remedy(model, recipe, gpu, gpus)
    if fitting is None:
        return None
    low, high = (steps * step_seconds(model, recipe, gpu, gpus, fitting[1], case) / 3600 for case in (0, 1))
    return low, high


def unknown(overrides: list[str], model: str) -> list[str]:
    """The overrides whose cost is not known. Not a copy of the model: a path that ends in its name on the hub."""
    return [
        given.input_line
        for given in parsed(overrides)
        if given.key_or_group in ASSUMED
        or (
            given.key_or_group == "actor_rollout_ref.model.path"
            and Path(str(given.value())).name.lower() != f"qwen2.5-{model}"
        )
    ]


def cost(runs: list[tuple[DictConfig, list[str]]]) -> str:
    """What runs still take: hours on each type of GPU, and disk, as lines of text. Or why that is not known.

    Nothing for the tiny model, nor without flash-attn, where a run has four times the micro-batches.

    runs: `recipe` and `trainer` of each, with the steps that are left as `trainer.total_training_steps`; its overrides.
    """
    known, left_out = [], dict[str, None]()
    for run, overrides in runs:
        script = f"{'dapo_' if run.recipe.family == 'dapo' else ''}{run.recipe.task}.sh"
        model = next((model for model in MODELS if model.name == run.recipe.model), None)
        row = next((row for row in RECIPES if (row.script, str(row.limit)) == (script, run.recipe.length)), None)
        if run.recipe.model == "tiny" or run.recipe.attention != "flash":
            continue
        others = unknown(overrides, run.recipe.model)
        others += [] if run.recipe.family in ("aggregation", "dapo") else [f"family={run.recipe.family}"]
        left_out |= dict.fromkeys(others)
        if not model or not row or others:
            continue
        gpus = run.trainer.nnodes * run.trainer.n_gpus_per_node
        known.append((model, row, gpus, run.trainer.total_training_steps))
    note = f"no cost with {', '.join(left_out)}: only the paper's models and batches are worked out" if left_out else ""
    if not known:
        return note
    lines = ["cost, worked out on paper for the paper's models, without validation (vlnorm_verl.runs.resources):"]
    several = any(run.trainer.nnodes > 1 for run, _ in runs)
    if several:
        lines.append("  no hours with trainer.nnodes above 1: they depend on the network between the nodes")
    for gpu in [] if several else GPU_TYPES:
        hours = [run_hours(model, row, gpu, gpus, steps) for model, row, gpus, steps in known]
        fitting = [pair for pair in hours if pair]
        sizes = ", ".join(map(str, sorted({gpus for _, _, gpus, _ in known})))
        parts = []
        if fitting:
            needed = dict.fromkeys(pair[0] for run in known if (pair := remedy(*run[:2], gpu, run[2])))
            settings = " and ".join(name for name in needed if name != "yes")
            to_fit = f" with {settings} (docs/costs.md)" if settings else ""
            parts.append(f"{between(*map(sum, zip(*fitting, strict=True)))} hours of {sizes} GPUs{to_fit}")
        if len(fitting) < len(hours):
            parts.append(f"{len(hours) - len(fitting)} of {len(hours)} runs do not fit")
        lines.append(f"  {gpu.name}: {'; '.join(parts)}")
    billions = sum(model.parameters for model, *_ in known) / GB
    lines.append(
        f"  disk: {rounded(2 * CHECKPOINT_BYTES * billions)} GB for two checkpoints of each while it goes on, "
        f"{rounded(4 * billions)} GB when finished"
    )
    return "\n".join(filter(None, [*lines, note]))


def rounded(value: float) -> str:
    """Two significant figures: nothing here is known better."""
    return f"{float(f'{value:.2g}'):g}"


def between(low: float, high: float) -> str:
    return rounded(low) if rounded(low) == rounded(high) else f"{rounded(low)}–{rounded(high)}"


def table(gpus: int) -> str:
    fit = [f"{gpu.name}: fits" for gpu in GPU_TYPES]
    hour = [f"{gpu.name}: hours" for gpu in GPU_TYPES]
    cached = ["cached responses, 80 GB", "40 GB", "24 GB"]
    header = ["recipe", "length", "model", "update, GiB", "log-probs, GiB", "host, GiB", *cached, *fit, *hour]
    lines = ["| " + " | ".join([*header, "link by PCIe, s a step"]) + " |", "|" + "---|" * (len(header) + 1)]
    for recipe in RECIPES:
        for model in MODELS:
            cells = [recipe.script, str(recipe.limit), model.name]
            cells.append(between(*update_gib(model, recipe, gpus, MICRO_BATCH)))
            cells.append(between(*log_prob_gib(model, recipe, gpus, MICRO_BATCH, chunked=False)))
            cells.append(between(*host_gib(model, gpus)))
            cells += [rounded(max(0, cached_responses(model, recipe, GPU_TYPES[i]))) for i in (0, 2, 3)]
            cells += [(remedy(model, recipe, gpu, gpus) or ("no",))[0] for gpu in GPU_TYPES]
            hours = [run_hours(model, recipe, gpu, gpus, 1000) for gpu in GPU_TYPES]
            cells += [between(*pair) if pair else "–" for pair in hours]
            cells.append(between(*(link_seconds(model, recipe, gpus, MICRO_BATCH, bandwidth) for bandwidth in PCIE)))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables() -> str:
    return "\n\n".join(f"One node of {gpus} GPUs:\n\n{table(gpus)}" for gpus in NODES)


if __name__ == "__main__":
    print(tables())
