"""The configuration of a run (`run.toml`) and of a client in a deployment (`party.toml`).

Each class is a section of the file; each field is a key, with its default and a description of its
meaning and unit. `fedsp.config_file` reads files and fills in presets.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticKnownError

from fedsp.errors import ConfigurationError, did_you_mean


def _from_home(name: object) -> object:
    """A file name, in which ~ is the user's folder."""
    known = isinstance(name, str) and name.startswith("~")
    return os.path.expanduser(str(name)) if known else name  # noqa: PTH111  ~nobody/x stays as it is


FileName = Annotated[str, BeforeValidator(_from_home)]

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1, le=10**9)]
Batch = Annotated[int, Field(ge=1, le=1 << 16)]
Width = Annotated[int, Field(ge=1, le=1 << 16)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0)]
LearningRate = Annotated[float, Field(gt=0, le=100)]
Decay = Annotated[float, Field(ge=0)]
Noise = Annotated[float, Field(ge=0.05, le=1e5)]
"""Less noise than a twentieth of the clipping bound gives no useful epsilon, and the accountant
would need gigabytes of memory to compute it."""
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""Allowed names of clients in a deployment."""
DIGEST = "^[0-9a-f]{64}$"

AttackName = Literal[
    "none",
    "sign_flip",
    "gaussian",
    "little_is_enough",
    "inner_product",
    "mimic",
    "scaling",
    "free_rider",
    "stale",
    "duplicate",
    "not_finite",
    "huge",
    "out_of_shape",
    "label_flip",
    "backdoor",
]
CodecName = Literal["float32", "float16", "int8", "int4", "sign"]
ClientPrecision = Literal["float32", "bfloat16", "8bit", "4bit"]


def _kinds(annotation: Any) -> list[Any]:
    """What a field of this annotation may hold."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [kind for one in get_args(annotation) for kind in _kinds(one)]
    return [annotation]


def _taken_as(value: object, annotation: Any) -> type[int] | type[float] | None:
    """The kind of number as which pydantic would take a true or false in this value, or None."""
    kinds = _kinds(annotation)
    if isinstance(value, bool):
        return None if bool in kinds else int if int in kinds else float if float in kinds else None
    table = value if isinstance(value, dict) else {}
    parts = value if isinstance(value, list) else [*table.values()]
    inside = [held[-1 if table else 0] for kind in kinds if (held := get_args(kind))]
    found = (_taken_as(part, held) for part in parts for held in inside)
    return next(filter(None, found), None)


class Section(BaseModel):
    """A table of a configuration file. Unknown keys and numbers that are not finite are refused,
    and so is true or false in a number's place."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_other_kind(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, str) and "\0" in value:
            raise ValueError("it contains a NUL character: remove it")
        if number := _taken_as(value, cls.model_fields[str(info.field_name)].annotation):
            raise PydanticKnownError("int_type" if number is int else "float_type")
        return value


class ModelSection(Section):
    """The global model. It stays on the server."""

    name: FileName
    """Hugging Face hub name or folder of a causal language model, or a .gguf file, which is read
    once and kept as safetensors in the user's cache folder; 'embedded' is a small one that comes
    with fedsp"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps; split: layers are spread over all GPUs, then memory, then disk,
    for a model that fits on no GPU"""
    precision: Literal["auto", "float32", "bfloat16", "8bit", "4bit"] = "auto"
    """data type of the frozen weights; auto: bfloat16 on CUDA, float32 elsewhere; 8bit and 4bit
    need auxiliary.folder. Soft prompts are always float32"""
    recompute: bool = False
    """gradient checkpointing in the server's steps: less memory, more time"""
    positions: Literal["hugging_face", "from_zero"] = "hugging_face"
    """position of the first text token behind a prompt of P tokens; hugging_face: P, as in PEFT and
    generate; from_zero: 0, as in the authors' code"""
    offline: bool = False
    """refuse a hub name, even of a model that was fetched before: nothing is ever fetched"""

    @model_validator(mode="after")
    def _here(self) -> ModelSection:
        # os.path.exists, unlike Path.exists, is False for a text that cannot be a file name
        if self.offline and self.name != "embedded" and not os.path.exists(self.name):  # noqa: PTH110
            raise ValueError(
                f"model.name: {self.name!r} is no folder or file of this machine, and model.offline"
                " = true allows no hub name"
            )
        return self


class TaskSection(Section):
    """What the rows of the data are, for all parties alike."""

    task: str = "multiple_choice"
    """arc_easy, arc_challenge, openbookqa, hellaswag, piqa, sciq, race, webqs; for your own files
    multiple_choice (formatted as 'Question: ... Answer:'), continuation (questions as they are),
    completion (prompt and completion), classification (a text and its label) or chat (messages,
    in the model's own chat template)"""
    task_column: str | None = None
    """column that names the task of each row, where a federation has several; rows without a value
    are of the task above; none: all are"""
    ends: bool = True
    """of the tasks completion and classification: whether the tokenizer's end token is trained as
    the last token of a completion or label, so that the model learns to stop; of the figures of the
    test exact_match alone counts it, of completions"""
    template: str = "{text}\nLabel:"
    """of the task classification: what stands in front of the label, with the names of columns in
    braces"""
    label: str = "label"
    """of the task classification: the column of the label"""
    labels: list[str] = []
    """of the task classification: the labels to choose from; none: those of the training
    examples"""

    @field_validator("labels")
    @classmethod
    def _different(cls, labels: list[str]) -> list[str]:
        names = [label.strip() for label in labels]
        if "" in names:
            raise ValueError("one label is empty: take it out")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{twice[0]!r} stands there twice: name each label once")
        return names


class DataSection(TaskSection):
    """The task and its examples."""

    train: FileName | None = None
    """training examples, a JSONL, CSV, Excel, Parquet or SQL file, or a folder
    (docs/how-to/data.md); none: the task's data set on the Hugging Face hub"""
    validation: FileName | None = None
    """file of the server's validation examples; none: the fraction `holdout` of `train`"""
    test: FileName | None = None
    """file of test examples, for the end of a run and `fedsp evaluate`; none: the fraction
    `test_holdout` of `train`"""
    columns: dict[str, str] = {}
    """your files' own names of columns, by the field that the task reads, such as { prompt =
    "Ticket text" }; others keep their names"""
    test_examples: int | None = Field(None, ge=1)
    """most test examples to use, the same random subset for every seed; none: all"""
    holdout: Share = 0.1
    """fraction of train held out for validation if there is no validation file"""
    test_holdout: Share = 0.1
    """fraction of train held out for the test if there is no test file, the same for every seed; in
    a deployment, of the server's own examples"""
    max_tokens: int | None = Field(None, ge=8)
    """longest example in tokens; longer ones are truncated at the start of their context; none: the
    model's limit"""


class PartitionSection(Section):
    """How training examples are divided among the server and simulated clients."""

    clients: Count = 10
    """number of clients; 0: all examples are at the server. With kind = natural the column
    decides"""
    kind: Literal["even", "linear", "exponential", "dirichlet", "natural", "pathological"] = "even"
    """even: equal sizes; linear, exponential: unequal sizes; dirichlet: skewed by a column;
    natural: one client per value of a column; pathological: few values per client"""
    column: str | None = None
    """column of the data that dirichlet, natural and pathological use; figures per client are
    weighted by it too"""
    topics: Count = 0
    """number of topics found by clustering the questions, used instead of a column (needs
    scikit-learn); 0: none"""
    alpha: Rate = 0.5
    """concentration of the Dirichlet distribution; smaller is more skewed"""
    values_per_client: Positive = 2
    """values of the column that each client has, for kind = pathological"""
    server_share: Share | None = None
    """fraction of train that belongs to the server; none: 1 / (clients + 1) if the server trains on
    it, else 0"""
    server_values: list[str] = []
    """values of the column whose examples are the server's own instead of a fraction, such as one
    domain of ten; no client has them"""


class AuxiliarySection(Section):
    """The auxiliary model: the small model that clients get, once."""

    plan: str | list[int]
    """the global layer at each depth of the auxiliary model: shared(0), copies(0), every(k),
    first(n), cells(0-1), ends(n, m), emulator(n, m), emulator(n, [2, 5]), tail(n, m), or a list
    such as [0, 0, 5, 5]; chosen(n), or chosen(n, ends) with so many verbatim at both ends: the
    layers without which the global model reads distill.text worst, chosen at the start of the run
    or by `fedsp plan`, which print them"""
    prompt_layers: list[int] | None = None
    """the prompt layer that each depth reads; none: as the plan says (`fedsp plan` prints it)"""
    embeddings: Literal["verbatim", "low_rank", "fresh"] = "verbatim"
    """token embeddings: verbatim: the global model's; low_rank: their best approximation of rank
    embedding_rank; fresh: random. The last two are distilled"""
    embedding_rank: Width = 32
    """rank for embeddings = low_rank"""
    precision: ClientPrecision = "float32"
    """data type of the frozen auxiliary model at simulated clients: float32, bfloat16, 8bit, 4bit;
    others than float32 only if client.auxiliary_steps is 0"""
    folder: FileName | None = None
    """folder of an auxiliary model that `fedsp distill` wrote; none: it is made at the start of the
    run"""

    @property
    def to_be_chosen(self) -> bool:
        """Whether the layers are still to be chosen, by the loss on public text."""
        return str(self.plan).strip().startswith("chosen")


class DistillSection(Section):
    """Knowledge distillation from the global to the auxiliary model, before the first round."""

    steps: Count
    """optimizer steps at most; 0: the layers are handed out as they are in the global model. Of
    distill.text that makes at least 512 sequences, or more than distill.sequences, up to 32 are
    held out, and distillation ends once the loss on them has stopped falling"""
    text: list[FileName]
    """text files (may be .gz), passages separated by blank lines; ['model']: texts that the global
    model writes by itself; ['server']: the server's own examples"""
    learning_rate: LearningRate
    """learning rate of AdamW"""
    weight_decay: Decay = 0.01
    """weight decay of AdamW"""
    batch_size: Batch = 8
    """sequences per step"""
    sequence_length: int = Field(128, ge=2)
    """tokens per sequence"""
    sequences: Positive = 512
    """most sequences to use; the global model's hidden states of each are computed once and cached,
    in memory up to 1 GiB, else on disk"""
    match_depths: Decay = 0.0
    """weight of an additional loss: mean squared error of hidden states at every depth; the paper
    has 0"""
    match_logits: Decay = 0.0
    """weight of an additional loss: KL divergence of next-token distributions, nats; the paper has
    0"""

    @property
    def is_read(self) -> bool:
        """Whether the making of a package reads a text."""
        return self.steps > 0 or self.reads_files

    @property
    def reads_files(self) -> bool:
        """Whether the text is public text in files."""
        return bool(self.text) and self.text not in (["model"], ["server"])


class PromptSection(Section):
    """The soft prompt: virtual tokens at every layer."""

    space: Literal["key_value", "residual", "input"]
    """what travels; for each layer key_value: attention keys and values, or residual: inputs of the
    block, half the bytes in models without grouped-query attention; input: only embeddings in front
    of the text's"""
    length: Annotated[int, Field(ge=1, le=8192)]
    """number of virtual tokens"""
    init: str
    """text: activations of real text; normal: random; or a prompt file or PEFT prefix-tuning
    folder"""
    init_text: FileName | None = None
    """file whose first tokens give the activations for init = text; none: the distillation text"""
    init_scale: Rate = 0.02
    """standard deviation for init = normal"""
    projection: Annotated[int, Field(ge=0, le=1 << 16)] = 0
    """hidden size of an MLP that reparameterizes the prompt during training, as in prefix-tuning
    (the authors use 512); 0: none"""


class MessengerSection(Section):
    """What is tuned and sent by method = "fedsp"."""

    kind: str = "prompt"
    """prompt: the soft prompt of [prompt]; adapter: low-rank updates of the linear modules in
    layers of the auxiliary model; layers: all weights of the layers that auxiliary.plan keeps
    verbatim; prompt+adapter: both; or the name of one that an installed package brings"""
    rank: Width = 8
    """rank of each adapter"""
    alpha: Rate = 16.0
    """adapters are scaled by alpha / rank"""
    layers: Literal["verbatim", "all"] = "verbatim"
    """layers of the auxiliary model that get adapters; verbatim: those that auxiliary.plan keeps;
    all: the distilled ones too, whose adapters the global model reads in the layers that they were
    distilled of"""
    targets: list[str] = []
    """names of the linear modules that get an adapter, such as c_attn; none: all"""
    train_first: bool = False
    """whether the first factor of an adapter (A) is trained and sent too; false: it is drawn from
    the seed on both sides and never sent, so that the mean over clients is exact (FFA-LoRA)"""
    options: dict[str, Any] = {}
    """keys of a messenger that an installed package brings, such as { norms = false }"""


class RoundSection(Section):
    """The rounds of the federation, and how updates are averaged."""

    rounds: Positive
    """number of rounds"""
    clients: Count | None = None
    """clients sampled in each round, of fewer all; none: all; 0: the server trains alone"""
    only: str | None = None
    """the one simulated client that is asked in every round, by name: what it would get alone
    through the same package; none: all may be asked"""
    min_clients: Count = 1
    """accepted updates that a round needs; with fewer the run stops and can be resumed"""
    weighting: Literal["examples", "uniform"] = "examples"
    """weights of the mean; examples: number of examples in the server's register; uniform: equal"""
    max_change: Rate = 1.0
    """largest accepted difference of an update from the broadcast prompt, root mean square over its
    numbers"""
    optimizer: Literal["none", "momentum", "line_search"] = "none"
    """server optimizer; none: the aggregate is what is broadcast next; momentum: FedAvgM;
    line_search: the mean update 1, 1.5, 2 or 3 times, whichever has the lowest validation loss"""
    learning_rate: LearningRate = 1.0
    """server learning rate of FedAvgM"""
    momentum: Share = 0.9
    """server momentum of FedAvgM"""

    def asked(self, clients: int) -> int:
        """How many of this number of clients are sampled in each round."""
        return clients if self.clients is None else min(self.clients, clients)

    def may_ask(self, register: Mapping[str, int]) -> dict[str, int]:
        """The clients of a register that may be asked.

        Raises:
            ConfigurationError: `only` is none of them.
        """
        if self.only is None:
            return dict(register)
        if self.only not in register:
            raise ConfigurationError(
                f"round.only: there is no client {self.only!r}{did_you_mean(self.only, register)};"
                f" the clients are {', '.join(sorted(register)[:10])}"
            )
        return {self.only: register[self.only]}


class ClientSection(Section):
    """Local training at each sampled client."""

    auxiliary_steps: Count
    """stage 1 of a round: steps on the client's auxiliary model with the prompt frozen; 0: no
    alternating training"""
    prompt_steps: Count
    """stage 2 of a round: steps on the prompt with the auxiliary model frozen"""
    learning_rate: LearningRate
    """learning rate of AdamW on what is tuned: about 3e-2 for a prompt, 5e-3 for adapters, 1e-3 for
    whole layers"""
    auxiliary_learning_rate: LearningRate = 5e-4
    """learning rate of AdamW on the auxiliary model"""
    weight_decay: Decay
    """weight decay of AdamW"""
    batch_size: Batch = 16
    """examples per step"""
    warmup: Share = 0.1
    """fraction of all steps of a run in which the learning rate rises linearly; then it falls
    linearly to 0. Applies to the server's steps too"""
    proximal: Decay = 0.0
    """mu of FedProx, for the steps on the prompt; 0: no proximal term"""
    keep_optimizer: bool
    """whether each client, and the server, keeps AdamW's moments from round to round; false: they
    start from zero in every round"""


class ServerSection(Section):
    """The server step: training on the server's own labelled examples after aggregation."""

    steps: Count
    """steps on the prompt through the global model in each round; 0: none"""
    learning_rate: LearningRate
    """learning rate of AdamW in the server step, on the prompt"""
    weight_decay: Decay
    """weight decay of AdamW"""
    batch_size: Batch = 16
    """examples per step"""


class AggregationSection(Section):
    """How updates are aggregated, and defences against malicious clients."""

    rule: str = "mean"
    """mean, or a robust rule: median, trimmed_mean, krum, multi_krum, geometric_median,
    centred_clipping; trust: FLTrust, weights by agreement with the server's own step; or one that
    you registered"""
    malicious: Share = 0.2
    """fraction of the sampled clients that may be malicious, rounded down: what a robust rule must
    withstand. A run with too few clients for that is refused"""
    mixing: bool = False
    """nearest-neighbour mixing before the rule"""
    norm_bound: Decay = 0.0
    """updates are clipped to this many times the median norm of all updates; 0: no clipping"""
    max_loss_rise: Decay | None = None
    """acceptance check: an aggregate is discarded if its validation loss at the server is above the
    lowest so far by more than this fraction; none: no check"""

    @field_validator("malicious")
    @classmethod
    def _zero_or_usable(cls, share: float) -> float:
        if 0 < share < 0.001:
            raise ValueError(
                "less than a thousandth rounds down to no client: set it to 0, or to the fraction"
                " that may be malicious"
            )
        return share

    @property
    def robust(self) -> bool:
        """Whether anything but the plain mean is configured."""
        return self.rule != "mean" or self.mixing or self.norm_bound > 0


def malicious_of(share: float, clients: int) -> int:
    """How many of so many clients a share of malicious ones is, rounded down."""
    return math.floor(share * clients + 1e-9)


class AttackSection(Section):
    """Malicious clients, in simulations."""

    kind: AttackName = "none"
    """none; on updates: sign_flip, gaussian, little_is_enough, inner_product, mimic, scaling,
    free_rider; on the protocol: stale, duplicate, not_finite, huge, out_of_shape; on data:
    label_flip, backdoor"""
    share: Share = 0.2
    """fraction of clients that are malicious, rounded down"""
    strength: Rate | None = None
    """factor of the malicious update; none: the usual one of each kind"""


class PrivacySection(Section):
    """Differential privacy of the clients' text."""

    unit: Literal["none", "example", "client"] = "none"
    """what is protected; example: each client clips and noises the gradients of its own steps
    (DP-SGD), so nobody needs to be trusted; client: the server, which is trusted, clips updates and
    noises their sum (DP-FedAvg)"""
    epsilon: Rate | None = None
    """privacy budget of the whole run; the noise is calibrated to it"""
    noise_multiplier: Noise | None = None
    """instead of epsilon: standard deviation of the noise as a multiple of clip"""
    delta: float = Field(1e-5, gt=0, lt=1)
    """probability that the guarantee of epsilon fails; choose it well below one over the number of
    examples (or clients)"""
    clip: Rate = 1.0
    """clipping bound: largest Euclidean norm of one example's gradient, or of one client's update.
    Choose it on public text, never on private text"""


class CompressionSection(Section):
    """Compression of messages."""

    up: CodecName = "float32"
    """codec of clients' updates; float32: uncompressed; float16, int8, int4, sign: the quantized
    change, with error feedback"""
    down: CodecName = "float32"
    """codec of the server's broadcasts to clients that answered in the round before; the others get
    the whole prompt"""


class LoraSection(Section):
    """Low-rank adapters, for method = "lora"."""

    rank: Width = 8
    """rank of each adapter"""
    alpha: Rate = 16.0
    """adapters are scaled by alpha / rank"""
    targets: list[str] = []
    """names of the linear modules that get adapters, such as c_attn; none: PEFT's default for the
    model's family"""


class TrackingSection(Section):
    """Experiment tracking besides the run's folder."""

    mlflow: str | None = None
    """MLflow tracking URI, such as http://host:5000 or sqlite:///mlflow.db; none: no MLflow"""
    tensorboard: FileName | None = None
    """folder of TensorBoard's event files, in which each run has one of its name; none: no files"""
    wandb: str | None = None
    """project of Weights & Biases; with WANDB_MODE=offline nothing is sent until `wandb sync`;
    none: it is not told"""


class ValidationSection(Section):
    """How the best round is chosen; test examples are never used for it."""

    by: Literal["server", "clients", "none"] = "server"
    """server: lowest loss through the global model; clients: lowest loss through their auxiliary
    models on a tenth of their examples, for which every round asks all of them; none: the last
    round"""
    examples: Positive = 300
    """most validation examples that the server uses"""
    every: Positive = 1
    """the server validates every so many rounds"""
    patience: Positive | None = None
    """the run stops after so many validations in a row without a lower loss; none: it has all
    rounds. Needs by = server"""

    @model_validator(mode="after")
    def _patient_by_the_server(self) -> ValidationSection:
        if self.patience and self.by != "server":
            raise ValueError(
                f"validation.patience: it counts the server's validations, and validation.by ="
                f" {self.by!r}; set it to 'server'"
            )
        return self


class FederationSection(Section):
    """A deployment. Without this section clients are simulated on the examples in data.train."""

    folder: FileName
    """folder with certificates, keys and the register of clients, written by `fedsp federation
    init`"""
    listen: str = "0.0.0.0:8000"
    """host:port on which the server accepts connections"""
    runs: Positive = 1
    """runs that clients answer under one package. It is signed with the package; resuming a run
    does not count again"""
    connect_seconds: Rate = 600.0
    """timeout: how long a round waits for sampled clients that are not connected"""
    reply_seconds: Rate = 3600.0
    """timeout: how long a round waits for the reply to a request; later replies are ignored"""
    retry_seconds: Rate = 120.0
    """a request without a reply is sent again after this time, which then doubles; a client trains
    only once for it"""
    health: str | None = None
    """host:port of this machine alone, such as 127.0.0.1:9464, where /healthz and /metrics
    (Prometheus) answer; none: they do not"""


class RunConfig(Section):
    """A whole run: `run.toml`."""

    preset: Literal["messenger", "prompt", "paper"] = "messenger"
    """defaults of all other keys; messenger: what fedsp recommends, adapters; prompt: what it
    recommends where a soft prompt travels; paper: the settings of the FedSP paper and its authors'
    code"""
    profile: Literal["plain", "robust", "dp-example", "dp-client"] = "plain"
    """a set of protections; plain: none; robust: against malicious clients; dp-example, dp-client:
    differential privacy (docs/explanation/security.md)"""
    method: str = "fedsp"
    """fedsp, or a baseline: zero_shot, finetune, prefix_tuning, fedprompt, fedprompt_single, lora,
    offsite_tuning; or one that you registered"""
    seed: Count = 0
    """seed of all random numbers of the run, except those of differential privacy"""
    output: FileName = "runs/latest"
    """folder of the run"""
    model: ModelSection
    data: DataSection
    partition: PartitionSection
    auxiliary: AuxiliarySection
    distill: DistillSection
    prompt: PromptSection
    messenger: MessengerSection = MessengerSection()
    round: RoundSection
    client: ClientSection
    server: ServerSection
    validation: ValidationSection
    aggregation: AggregationSection = AggregationSection()
    privacy: PrivacySection = PrivacySection()
    compression: CompressionSection = CompressionSection()
    attack: AttackSection = AttackSection()
    lora: LoraSection = LoraSection()
    tracking: TrackingSection = TrackingSection()
    federation: FederationSection | None = None

    @model_validator(mode="after")
    def _across_sections(self) -> RunConfig:
        partition, round, client = self.partition, self.round, self.client
        by_column = partition.kind in ("dirichlet", "natural", "pathological")
        if by_column and not (partition.column or partition.topics):
            raise ValueError(
                f"partition.column: partition.kind = {partition.kind!r} needs the name of a column,"
                " or partition.topics"
            )
        if partition.column and partition.topics:
            raise ValueError(
                "partition.topics: examples are divided by a column or by topics; set one of them"
            )
        if partition.server_values and not partition.column:
            raise ValueError("partition.server_values: they need partition.column, whose they are")
        if partition.server_values and partition.server_share:
            raise ValueError(
                "partition.server_share: the server's own examples are a fraction or those of"
                " partition.server_values, not both; leave it out"
            )
        counted = partition.clients and partition.kind != "natural" and not self.federation
        if counted and self.privacy.unit != "client":
            asked = round.asked(partition.clients)
            if asked and round.min_clients > asked:
                raise ValueError(
                    f"round.min_clients: a round needs {round.min_clients} updates but samples"
                    f" {asked} clients; set it to {asked} at most"
                )
        if round.only and (self.federation or not partition.clients or round.clients == 0):
            raise ValueError("round.only: it names one of several simulated clients that are asked")
        if self.attack.kind != "none" and self.federation:
            raise ValueError(
                "attack.kind: attacks are simulated, and the clients of a [federation] are real;"
                " set it to 'none'"
            )
        if round.optimizer == "line_search" and self.validation.by != "server":
            raise ValueError(
                "round.optimizer: a line search compares validation losses at the server; set"
                " validation.by to 'server', or round.optimizer to 'none' or 'momentum'"
            )
        if self.aggregation.max_loss_rise is not None and self.validation.by != "server":
            raise ValueError(
                "aggregation.max_loss_rise: the acceptance check needs validation.by = 'server'"
            )
        if self.aggregation.robust and round.weighting != "uniform":
            raise ValueError(
                "round.weighting: robust rules, mixing and norm_bound weight all clients equally;"
                " set it to 'uniform'"
            )
        if self.aggregation.rule == "trust" and not self.server.steps:
            raise ValueError(
                "aggregation.rule: trust compares updates with the server's own step; set"
                " server.steps above 0"
            )
        self._private()
        if self.distill.steps and not self.distill.text and not self.auxiliary.folder:
            raise ValueError(
                "distill.text: distillation needs text; name public text files, or ['model'] for"
                " texts that the global model writes, or ['server'] for the server's own examples"
            )
        if self.validation.by == "clients" and not self.asks_clients:
            raise ValueError(
                "validation.by: no client is sampled, so none can validate; use 'server' or 'none'"
            )
        changed = client.auxiliary_steps or self.federation
        if self.auxiliary.precision != "float32" and changed:
            raise ValueError(
                "auxiliary.precision: only simulated clients that leave the auxiliary model as it "
                f"is can hold it in {self.auxiliary.precision}: set it to float32, or set "
                "client.auxiliary_steps to 0 without a [federation]"
            )
        if self.messenger.kind != "prompt" and client.auxiliary_steps:
            raise ValueError(
                "client.auxiliary_steps: alternating training changes the layers in which"
                f" messenger.kind = {self.messenger.kind!r} lives; set it to 0"
            )
        if client.keep_optimizer and client.auxiliary_steps == 0 == client.prompt_steps:
            raise ValueError(
                "client.keep_optimizer: a client that takes no step has no optimizer to keep"
            )
        return self

    def _private(self) -> None:
        """Refuse what would break the guarantee of differential privacy."""
        _require_private(self.privacy, self, self.validation.by == "clients")
        if self.privacy.unit != "client":
            return
        if self.aggregation.robust:
            raise ValueError(
                "aggregation.rule: with privacy.unit = 'client' updates are clipped, summed and "
                "noised, and no other rule has a bounded sensitivity; set it to 'mean' without "
                "mixing and norm_bound"
            )
        if self.round.weighting != "uniform":
            raise ValueError(
                "round.weighting: with privacy.unit = 'client' all clients must count the same; set"
                " it to 'uniform'"
            )
        if self.round.min_clients:
            raise ValueError(
                "round.min_clients: with privacy.unit = 'client' a round releases its noisy sum"
                " however few reply; set it to 0"
            )

    def require_judges(self, register: Mapping[str, int]) -> None:
        """See that the clients that may be asked can choose the best round, if they are to.

        Raises:
            ConfigurationError: not all are asked in each round, so that rounds would be compared by
                different text, or none has an example to spare for it.
        """
        if self.validation.by != "clients" or not register:
            return
        what, instead = "validation.by = 'clients'", "set validation.by to 'server' or 'none'"
        asked = self.round.asked(len(register))
        if asked < len(register):
            raise ConfigurationError(
                f"{what} compares rounds by the text of all clients, but a round asks {asked} of"
                f" {len(register)} (round.clients): ask all, or {instead}"
            )
        if max(register.values()) < 2:
            raise ConfigurationError(
                f"{what}: no client has two examples, one of which it could hold out: {instead}"
            )

    @property
    def asks_clients(self) -> bool:
        """Whether there are clients, simulated or in a deployment, and any is sampled."""
        return bool(self.partition.clients or self.federation) and self.round.clients != 0

    @property
    def server_share(self) -> float:
        """The fraction of train that belongs to the server."""
        if self.federation:
            return 1.0  # what the clients hold is with the clients
        if self.partition.server_values:
            return 0.0
        if self.partition.server_share is not None:
            return self.partition.server_share
        if not self.partition.clients:
            return 1.0
        needed = self.server.steps > 0 or "server" in self.distill.text
        return 1 / (self.partition.clients + 1) if needed else 0.0


def _require_private(
    privacy: PrivacySection, run: RunConfig | Agreement, clients_validate: bool
) -> None:
    """Raise ValueError for what would break differential privacy: in a run's configuration, and in
    the agreement that a client is asked to accept."""
    if privacy.unit == "none":
        if privacy.epsilon is not None or privacy.noise_multiplier is not None:
            raise ValueError(
                "privacy.unit: it is 'none', so no noise is added and privacy.epsilon and "
                "privacy.noise_multiplier have no effect; set it to 'example' or 'client', as the "
                "profiles dp-example and dp-client do"
            )
        return
    if (privacy.epsilon is None) == (privacy.noise_multiplier is None):
        raise ValueError("privacy.epsilon: set it, or privacy.noise_multiplier, and not both")
    if clients_validate:
        raise ValueError(
            "validation.by: losses that clients report are not covered by differential privacy; use"
            " 'server' or 'none'"
        )
    if privacy.unit != "example":
        return
    if run.client.auxiliary_steps:
        raise ValueError(
            "client.auxiliary_steps: alternating training fits the auxiliary model to the examples "
            "without noise, which breaks the guarantee of privacy.unit = 'example'; set it to 0"
        )
    wrong = {
        "client.proximal": run.client.proximal > 0,
        "prompt.projection": run.prompt.projection > 0,
    }
    if key := next((key for key, given in wrong.items() if given), None):
        raise ValueError(f"{key}: private steps train the prompt itself, without it; set it to 0")


class Agreement(Section):
    """What the owner of the model asks of every client in a run.

    It is signed together with the auxiliary model, so no request can ask for more.
    """

    method: str = "fedsp"
    """fedsp"""
    privacy: PrivacySection = PrivacySection()
    compression: CompressionSection = CompressionSection()
    seed: Count
    """seed of the client's held-out examples and of its projection"""
    rounds: Positive
    """rounds of a run; a client refuses requests for any further round"""
    max_tokens: Positive
    """longest example in tokens; longer ones are truncated at the start"""
    positions: Literal["hugging_face", "from_zero"]
    """position of the first text token behind the prompt"""
    data: TaskSection
    """the task, and how its rows are read"""
    prompt: PromptSection
    messenger: MessengerSection = MessengerSection()
    client: ClientSection
    runs: Positive = 1
    """runs that a client answers under this package; resuming is not a new run"""
    clients_validate: bool
    """whether clients hold out a tenth of their examples and report their loss on it"""

    @model_validator(mode="after")
    def _keeps_privacy(self) -> Agreement:
        """A client refuses what would break its privacy, whoever signed it."""
        _require_private(self.privacy, self, self.clients_validate)
        return self


class PackageSection(Section):
    """The package: the folder with the auxiliary model and the signed agreement that the owner of
    the model handed to you."""

    folder: FileName = "package"
    """folder that you received; it is only read; relative to party.toml"""
    sha256: str = Field(pattern=DIGEST)
    """SHA-256 digest of the package; the owner of the model tells it to you by another channel than
    the package"""


class PartyDataSection(Section):
    """Your text. It is read on this machine and never leaves it."""

    train: FileName
    """your examples, a JSONL, CSV, Excel, Parquet or SQL file, or a folder, in the form that the
    task of the signed package asks for"""
    columns: dict[str, str] = {}
    """your file's own names of columns, by the field that the task reads, such as { prompt =
    "Ticket text" }; others keep their names"""
    task: str | None = None
    """the task that you expect: another one in the signed package is refused; none: any"""


class PolicySection(Section):
    """Your own limits. A request that exceeds them is refused."""

    max_rounds: Positive = 1000
    """most rounds that this client answers under one package, over all runs"""
    min_examples: Positive = 1
    """with fewer examples the client does not take part; few examples are easier to reconstruct
    from an update"""
    methods: list[str] = ["fedsp"]
    """methods that are accepted"""
    plans: list[str | list[int]] = []
    """layer plans that are accepted, such as ["ends(2)", [0, 3, 7]]; none: any"""
    require_differential_privacy: bool = False
    """take part only in runs with example-level differential privacy"""
    max_epsilon: Rate | None = None
    """largest epsilon that all runs together may cost this client's examples, by its own ledger;
    none: what the package promises for one run, times its runs"""
    max_delta: float = Field(1e-5, gt=0, lt=1)
    """largest delta at which an epsilon is accepted"""
    release: Literal["automatic", "ask"] = "automatic"
    """ask: each update waits until a person has released it (`fedsp egress release`); the server
    waits for federation.reply_seconds"""
    release_seconds: Rate = 3600.0
    """with release = ask: an update that nobody has decided on by then is withheld"""

    @model_validator(mode="after")
    def _needs_a_size(self) -> PolicySection:
        if self.require_differential_privacy and self.max_epsilon is None:
            raise ValueError(
                "policy.max_epsilon: policy.require_differential_privacy needs it; set the largest"
                " epsilon that you accept, such as 8"
            )
        return self


class PartyConfig(Section):
    """A client of a deployment: `party.toml`."""

    name: str = Field(pattern=NAME)
    """this client's name in the server's register"""
    server: str
    """host:port of the server"""
    keys: FileName = "."
    """folder with ca.crt, server.pub and this client's client.key"""
    state: FileName = "state"
    """folder for what this client keeps between rounds (its privacy ledger, its answers); nothing
    in it is sent. Do not delete it during a run"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps"""
    precision: ClientPrecision = "float32"
    """data type of the frozen auxiliary model: float32, bfloat16, 8bit, 4bit; others than float32
    only if the run does not train it"""
    health: str | None = None
    """host:port of this machine alone, such as 127.0.0.1:9465, where /healthz and /metrics
    (Prometheus) answer; none: they do not"""
    data: PartyDataSection
    package: PackageSection
    policy: PolicySection = PolicySection()
