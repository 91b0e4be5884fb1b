"""What a run will cost and disclose, counted before anything is trained and without any weights,
but those by which the layers of a plan `chosen(n)` are chosen.

Floating-point operations are those of matrix products: two per weight and token in a forward pass,
4 H_q K per token and key in attention. A step on the prompt needs a forward pass and a backward
pass to the inputs (2 forwards' worth); a step on the weights needs 3.

Parameters are counted by torch once for each model configuration and layer plan, and kept in the
user's cache; a plan of a known shape then takes no time.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from fedsp.config import CodecName, RunConfig
from fedsp.config_file import makes_package, read_register
from fedsp.data.dataset import FederatedDataset, load_dataset
from fedsp.data.files import read_passages
from fedsp.errors import (
    AuxiliaryError,
    ConfigurationError,
    DataError,
    FedspError,
    ModelError,
    StorageError,
    first_line,
    leaves_no_room,
)
from fedsp.experiments.embedded import EMBEDDED
from fedsp.federation.methods.registry import find_method
from fedsp.models.gguf import folder_of_gguf, is_gguf
from fedsp.models.messengers.registry import Shapes, Sizes, counted, find_messenger
from fedsp.storage import MANIFEST, cache_folder, parse_json, write_json

COUNTED_BY = ("adapter", "auxiliary", "messengers/making", "shape_counts")
"""The modules of `fedsp.models` whose code decides the counts of a plan."""
BYTES_PER_NUMBER = 4
MUCH_WORSE = 1.5
"""Nats per token of public text that a package may be worse than the global model: beyond, less
than half of the gain carried in what was measured (docs/results/messengers.md)."""
LEAST_ROOM = 8
"""Tokens of text that a prompt must leave room for."""
TEXT_TOKENS = 64
ANSWER_TOKENS = 8


def plan_run(config: RunConfig) -> dict[str, Any]:
    """The figures of `make_plan` with the clients that the configuration has: those of its
    federation's register, of the column that divides its text, or so many. The files that the run
    will read are read.

    Raises:
        FedspError: the run cannot be planned, as one sentence.
    """
    if not find_method(config.method).deployable:
        raise ConfigurationError(
            f"method = {config.method!r}: `fedsp plan` covers FedSP only; a baseline's cost is"
            " measured in its run and shown by `fedsp report`"
        )
    check_text(config)
    dataset = check_examples(config)
    if config.auxiliary.to_be_chosen:
        from fedsp.experiments.server_setup import with_layers_chosen

        folder = config.auxiliary.folder
        made = folder if folder and (Path(folder) / MANIFEST).exists() else None
        section = config.auxiliary.model_copy(update={"folder": made})
        config = with_layers_chosen(config.model_copy(update={"auxiliary": section}))
    clients = config.partition.clients
    if config.federation:
        clients = len(read_register(Path(config.federation.folder)))
    elif config.partition.kind == "natural":
        clients = len((dataset or load_dataset(config)).partition.clients)
    if config.round.only:
        clients = 1
    if config.aggregation.robust:
        from fedsp.experiments.run import robust_rule

        robust_rule(config, clients)
    return make_plan(config, clients)


def check_examples(config: RunConfig) -> FederatedDataset | None:
    """The examples of a run, if they are in files, none of which is fetched from the hub; of
    conversations that the model's chat template writes the first of each split.

    Raises:
        DataError: a file is missing or cannot be used, the examples cannot be divided, or the model
            has no chat template for them.
        ConfigurationError: the clients cannot be asked as configured.
        ModelError: there are conversations, and the model's tokenizer cannot be had.
    """
    if not (config.data.train or config.federation or config.model.offline):
        return None
    dataset = load_dataset(config)
    if find_method(config.method).federated and not config.federation:
        held = {client: len(rows) for client, rows in dataset.partition.clients.items()}
        config.require_judges(config.round.may_ask(held))
    splits = (dataset.train, dataset.validation, dataset.test)
    chats = [chat for split in splits for chat in islice((row for row in split if row.turns), 1)]
    if chats:
        from fedsp.data.chat import read_conversation
        from fedsp.models.loading import load_tokenizer

        tokenizer = load_tokenizer(model_name(config))
        for chat in chats:
            read_conversation(tokenizer, chat)
    return dataset


def check_text(config: RunConfig) -> None:
    """Read the public text of a run, where it is in files, so that none is missing later.

    Raises:
        DataError: a file is missing or cannot be used.
    """
    if config.distill.reads_files and not config.auxiliary.folder:
        read_passages(config.distill.text)
    if config.prompt.init == "text" and config.prompt.init_text:
        read_passages([config.prompt.init_text])


def require_sequences_fit(config: RunConfig, positions: int, name: str) -> None:
    """See that a model with so many positions reads sequences of `distill.sequence_length` tokens.

    Raises:
        DataError: they are longer.
    """
    length, room = config.distill.sequence_length, positions - config.prompt.length
    if length > room:
        raise DataError(
            f"distill.sequence_length = {length} is more than the {room} tokens that {name} reads"
            " behind a prompt"
        )


def make_plan(config: RunConfig, clients: int) -> dict[str, Any]:
    """The figures of `fedsp plan`: everything that the configuration implies for a run with so many
    clients. Parameters and bytes are counts; operations are per step of one batch; shares are of
    the global model.

    Memory is weights in their precision, and gradients and AdamW's moments in float32; activations
    come on top. The disclosed share is what stays bit for bit after distillation; the handed-out
    share is what would, with no distillation. Embeddings that are not handed out verbatim count in
    neither.

    Raises:
        ModelError: the model's configuration cannot be had.
        ConfigurationError: the layer plan does not fit it.
        DataError: sequences of `distill.sequence_length` tokens do not fit it.
        PromptError: the prompt leaves no room for text.
    """
    name = model_name(config)
    try:
        counts = _known_counts(config, name)
    except FedspError:
        raise
    except Exception as error:  # it says by layer, or not at all, what is counted here
        raise ModelError(
            f"{name} cannot be planned for: its configuration does not say what is counted"
            f" ({first_line(error)})"
        ) from error
    taken = config.prompt.length if config.model.positions == "hugging_face" else 0
    if (room := counts["positions"] - taken) < LEAST_ROOM:
        raise leaves_no_room(config.prompt.length, room, counts["positions"])
    if makes_package(config) and config.distill.is_read:
        require_sequences_fit(config, counts["positions"], name)
    client, server, section = config.client, config.server, config.auxiliary
    shapes, plan = travelling(config, counts), counts["plan"]
    numbers = sum(math.prod(shape) for shape in shapes.values())
    message = _message_bytes(shapes, "float32")
    up, change = (
        _message_bytes(shapes, codec) for codec in (config.compression.up, config.compression.down)
    )
    asked = config.round.asked(clients)
    follows = asked / clients if clients else 0.0  # of those asked: have the broadcast before
    per_round = round(asked * (up + follows * change + (1 - follows) * message))
    whole, small = counts["global"]["parameters"], counts["auxiliary"]["parameters"]
    handed = verbatim = small
    if config.distill.steps:
        verbatim = small - counts["distilled"] if any(plan["frozen"]) else 0
    if section.embeddings != "verbatim":
        handed = small - counts["embeddings"]
        verbatim = max(0, verbatim - counts["embeddings"])
    if not config.asks_clients:
        handed = verbatim = 0
    tokens = min(config.data.max_tokens or TEXT_TOKENS, TEXT_TOKENS)
    entry = find_messenger(config.messenger.kind)
    has_prompt = entry.has_prompt
    virtual = config.prompt.length if has_prompt else 0
    steps = {
        side: _forward_operations(counts, side, virtual, tokens) for side in ("auxiliary", "global")
    }
    gradients = 2.0 * numbers * tokens if entry.trains_weights else 0.0  # of weights
    begins = {"global": 0.0, "auxiliary": 0.0}
    if entry.in_layers and not has_prompt:
        begins = _share_before(shapes, plan["sources"], counts["shape"]["layers"])
    tuning = {side: (2 - begins[side]) * steps[side] + gradients for side in steps}
    cuda = config.model.device.startswith("cuda") or (
        config.model.device in ("auto", "split") and shutil.which("nvidia-smi") is not None
    )
    precision = "bfloat16" if config.model.precision == "auto" and cuda else config.model.precision
    # adapters and layers begin alike on both sides, so that the first broadcast is a change too
    first = message if has_prompt else change
    whole_at_first = round(asked * follows * (first - change))
    judged = clients * change if config.validation.by == "clients" else 0  # the last broadcast
    trained = 3 * small if client.auxiliary_steps else 0
    return {
        "model": name if config.model.name == "embedded" else config.model.name,
        "layers": plan["sources"],
        "prompt_layers": plan["prompt_layers"],
        "global_parameters": whole,
        "auxiliary_parameters": small,
        "ratio": whole / small,
        "package_bytes": small * BYTES_PER_NUMBER if config.asks_clients else 0,
        "messenger_parameters": numbers,
        "bytes_per_message": message,
        "bytes_per_round": per_round,
        "bytes_in_all": per_round * config.round.rounds + whole_at_first + judged,
        "client_operations_auxiliary": (
            3 * steps["auxiliary"] * client.batch_size if client.auxiliary_steps else 0.0
        ),
        "client_operations_prompt": (
            tuning["auxiliary"] * client.batch_size if client.prompt_steps else 0.0
        ),
        "server_operations": tuning["global"] * server.batch_size if server.steps else 0.0,
        "client_memory_bytes": _weight_bytes(counts, "auxiliary", section.precision)
        + BYTES_PER_NUMBER * (4 * numbers + trained),
        "server_memory_bytes": _weight_bytes(counts, "global", precision)
        + BYTES_PER_NUMBER * 4 * numbers,
        "disclosed_share": verbatim / whole,
        "handed_out_share": handed / whole,
        "tokens_per_example": tokens,
        **_excess_text_loss(config),
    }


def _share_before(shapes: Iterable[str], sources: Sequence[int], layers: int) -> dict[str, float]:
    """The share of each model's depths before the first that tensors of these names, such as
    `layers.003.A`, live in: the backward pass ends there."""
    held = {int(found[1]) for name in shapes if (found := re.match(r"layers\.(\d+)\.", name))}
    if not held:
        return {"global": 0.0, "auxiliary": 0.0}
    at = [depth for depth, source in enumerate(sources) if source in held]
    return {"global": min(held) / layers, "auxiliary": min(at, default=0) / len(sources)}


def how_it_reads(excess_text_loss: float) -> str:
    """What the loss of a package on public text, above that of the global model, means for what is
    tuned through it."""
    sentence = (
        "on public text that it was not distilled on, the auxiliary model is"
        f" {excess_text_loss:.2f} nats a token worse than the global model"
    )
    if excess_text_loss <= MUCH_WORSE:
        return sentence
    return (
        f"warning: {sentence}; beyond {MUCH_WORSE:g} less than half of what clients might gain"
        " carried in measurements: distil longer (distill.steps), or keep more layers"
        " (auxiliary.plan)"
    )


def _excess_text_loss(config: RunConfig) -> dict[str, float]:
    """What the package that the configuration names says of itself, if it is there already.

    Raises:
        AuxiliaryError: what is there cannot be read.
    """
    folder = config.auxiliary.folder
    if not folder:
        return {}
    try:
        manifest = parse_json((Path(folder) / MANIFEST).read_text(encoding="utf-8"))
        excess = manifest.get("excess_text_loss")
        return {} if excess is None else {"excess_text_loss": float(excess)}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise AuxiliaryError(
            f"auxiliary.folder: the auxiliary model in {folder} cannot be used: {error}; make it"
            " again with `fedsp distill`"
        ) from error


def model_name(config: RunConfig) -> str:
    """The folder or hub name of the global model, as `folder_or_hub_name`."""
    return folder_or_hub_name(config.model.name)


def folder_or_hub_name(name: str) -> str:
    """That of a model by the name that `model.name` may give it; of a GGUF file the folder that is
    made of it at first.

    Raises:
        ModelError: it is a GGUF file that cannot be read.
    """
    if name == "embedded":
        return str(EMBEDDED / "model")
    return str(folder_of_gguf(Path(name))) if is_gguf(name) else name


def _known_counts(config: RunConfig, name: str) -> Any:
    """The counts of a model and plan: from the cache, if they were made there by the same code from
    the same configuration file."""
    asked = (config.auxiliary.plan, config.auxiliary.prompt_layers)
    models = Path(__file__).parents[1] / "models"
    shape = Path(name) / "config.json"
    if not shape.is_file():
        return _count(name, *asked)
    code = [(models / f"{module}.py").read_text(encoding="utf-8") for module in COUNTED_BY]
    versions = [version("fedsp"), version("transformers"), *code]
    key = json.dumps([shape.read_text(encoding="utf-8"), asked, versions])
    kept = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    with suppress(OSError, ValueError):
        return json.loads(kept.read_bytes())
    counts = _count(name, *asked)
    with suppress(StorageError):
        write_json(kept, counts)
    return counts


def _count(name: str, plan: str | list[int], prompt_layers: list[int] | None) -> Any:
    from fedsp.models.shape_counts import count_shapes

    return count_shapes(name, plan, prompt_layers)


def travelling(config: RunConfig, counts: Any) -> Shapes:
    """The names and shapes of the tensors that travel, from the counts of `count_shapes`. Raises
    what `counted` does."""
    section, layers = config.messenger, counts["layers"][config.messenger.layers]
    prompt = [config.prompt.length, *counts["prompts"][config.prompt.space]]
    sizes = Sizes(
        layers=layers,
        hidden=counts["shape"]["hidden"],
        prompt=prompt,
        settings=section.model_dump(),
    )
    return counted(section.kind, sizes)


def _message_bytes(shapes: Shapes, codec: CodecName) -> int:
    """What these tensors take in a codec, when their numbers change by a normal."""
    if codec == "float32":
        # safetensors: eight bytes, a header padded to a multiple of eight, the numbers
        about, size = {}, 0
        for name, shape in sorted(shapes.items()):
            end = size + BYTES_PER_NUMBER * math.prod(shape)
            about[name] = {"dtype": "F32", "shape": shape, "data_offsets": [size, end]}
            size = end
        return 8 + 8 * math.ceil(len(json.dumps(about, separators=(",", ":"))) / 8) + size
    import torch

    from fedsp.federation.compression import encode

    generator = torch.Generator().manual_seed(0)
    noise = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return len(encode(noise, codec))


def _forward_operations(counts: Any, side: str, prompt: int, tokens: int) -> float:
    """Floating-point operations of one forward pass over one example behind a prompt, logits at
    ANSWER_TOKENS positions; shared depths count each time."""
    shape = counts["shape"]
    depth = shape["layers"] if side == "global" else len(counts["plan"]["sources"])
    keys = tokens * (prompt + tokens)
    attention = 4 * depth * counts["attention_heads"] * shape["head_size"] * keys
    head = 2 * shape["hidden"] * counts["vocabulary"] * min(tokens, ANSWER_TOKENS)
    return float(2 * counts[side]["multiplied"] * tokens + attention + head)


def _weight_bytes(counts: Any, side: str, precision: str) -> int:
    """What the weights of a model take: in few bits the matrices of its blocks, each scale of
    `4bit` in float32; all else as large as in its precision."""
    each = 2 if precision == "bfloat16" else BYTES_PER_NUMBER
    matrices: int = counts[side]["matrices"]
    others: int = counts[side]["parameters"] - matrices
    few: float = counts["few_bits"].get(precision, each)
    return round(few * matrices + each * others)
