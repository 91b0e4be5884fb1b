"""The configuration of a run and of a client: sections and keys, every unit in its description, and what no key can say alone.

How it is read from a file, with presets underneath, is in `fedsp.config_file`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1, le=10**9)]
Batch = Annotated[int, Field(ge=1, le=1 << 16)]
Width = Annotated[int, Field(ge=1, le=1 << 16)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0)]
LearningRate = Annotated[float, Field(gt=0, le=100)]
Decay = Annotated[float, Field(ge=0)]
Noise = Annotated[float, Field(ge=0.05, le=1e5)]
"""Below a twentieth of the bound no epsilon is worth the name, and an accountant would need gigabytes to say so."""
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""What the name of a client in a deployment may be."""


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


ClientPrecision = Literal["float32", "bfloat16", "8bit", "4bit"]
PRECISION = "in which clients hold the frozen auxiliary model in memory: float32, bfloat16, 8bit, 4bit; only where they do not train it"


class Section(BaseModel):
    """A table of the file: unknown keys and numbers that are not finite are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _text(cls, value: object) -> object:
        if isinstance(value, str) and "\0" in value:
            raise ValueError("it holds a NUL character, which no text of a configuration has; write it without")
        return value


class ModelSection(Section):
    """The global model: it stays on the server."""

    name: str = Field(description="hub name or folder of a causal language model; 'embedded' is the small one that fedsp ships")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps; split: spread over all GPUs, then memory, then the disk, for a model that fits none")
    precision: Literal["auto", "float32", "bfloat16", "8bit", "4bit"] = Field(
        "auto", description="of its frozen weights: auto: bfloat16 on CUDA, float32 elsewhere; 8bit and 4bit need auxiliary.folder; prompts are float32 always"
    )
    recompute: bool = Field(
        False, description="whether the server's steps keep only the inputs of each layer and compute the rest again going back: less memory, more time"
    )
    positions: Literal["hugging_face", "from_zero"] = Field(
        "hugging_face", description="hugging_face: tokens start at position P, as in PEFT and generate; from_zero: at 0, as in the authors' code"
    )


class DataSection(Section):
    """The questions."""

    task: str = Field(
        "multiple_choice",
        description="arc_easy, arc_challenge, openbookqa, hellaswag, piqa, sciq, race, webqs, or your own rows: multiple_choice (Question: ... Answer:), continuation (the question as it stands), completion",
    )
    train: str | None = Field(None, description="JSONL or CSV file, .gz too; none: the task's own data set on the Hugging Face hub")
    validation: str | None = Field(None, description="file of the server's validation questions; none: a share of train is held out")
    test: str | None = Field(None, description="file of test questions, for `fedsp evaluate` and the end of a run")
    test_examples: int | None = Field(None, ge=1, description="test questions at most, drawn alike for every seed; none: all")
    holdout: Share = Field(0.1, description="share of train held out for validation, when there is no validation file")
    max_tokens: int | None = Field(None, ge=8, description="tokens; longer examples lose their oldest context; none: what the model allows")


class PartitionSection(Section):
    """Who holds which training questions."""

    clients: Count = Field(10, description="clients; 0: everything in one place, at the server; with kind = natural it is the column that says")
    kind: Literal["even", "linear", "exponential", "dirichlet", "natural", "pathological"] = Field(
        "even",
        description="even; linear, exponential: unequal sizes; dirichlet over a column; natural: one client per value of a column; pathological: few values of a column per client",
    )
    column: str | None = Field(None, description="the column that dirichlet, natural and pathological go by, and by which figures per client are weighted")
    topics: Count = Field(0, description="instead of a column: so many topics, found by clustering the questions (needs scikit-learn); 0: none")
    alpha: Rate = Field(0.5, description="concentration of dirichlet: small is uneven")
    values_per_client: Positive = Field(2, description="values of the column per client, for pathological")
    server_share: Share | None = Field(
        None, description="share of train that is the server's own; none: 1 / (clients + 1) where the server trains on it, else 0"
    )


class AuxiliarySection(Section):
    """The small model that clients get, once."""

    plan: str | list[int] = Field(
        description="the global layer at each depth: shared(0), copies(0), every(k), first(n), cells(0-1), ends(n, m), emulator(n, m), or a list such as [0, 0, 5, 5]"
    )
    prompt_layers: list[int] | None = Field(None, description="the prompt layer that each depth reads; none: the plan's own map, printed by `fedsp plan`")
    embeddings: Literal["verbatim", "low_rank", "fresh"] = Field(
        "verbatim",
        description="verbatim: those of the global model; low_rank: what embedding_rank of their directions say; fresh: random; the last two are then distilled with the rest",
    )
    embedding_rank: Width = Field(32, description="rank of low_rank")
    precision: ClientPrecision = Field("float32", description=PRECISION + "; simulated clients, all of them")
    folder: str | None = Field(None, description="an auxiliary model already made by `fedsp distill`; none: it is made at the start of the run")


class DistillSection(Section):
    """Fitting the auxiliary model to the global one."""

    steps: Count = Field(description="optimizer steps; 0: hand out the layers as they are")
    text: list[str] = Field(description="text files (.gz too), blank lines between passages; ['server'] alone for the server's own examples")
    learning_rate: LearningRate = Field(description="of AdamW")
    weight_decay: Decay = Field(0.01, description="of AdamW")
    batch_size: Batch = Field(8, description="sequences per step")
    sequence_length: int = Field(128, ge=2, description="tokens per sequence")
    sequences: Positive = Field(512, description="sequences at most; their teacher states are computed once and kept: in memory, and beyond 1 GiB on the disk")
    match_depths: Decay = Field(0.0, description="weight of the mean squared error at every depth; 0 is the paper")
    match_logits: Decay = Field(0.0, description="weight of the KL divergence of next-token distributions, nats; 0 is the paper")
    again_every: Count = Field(
        0, description="rounds after which the package is distilled again, around the prompt as it stands, and handed out again; 0: never"
    )


class PromptSection(Section):
    """The soft prompt."""

    space: Literal["key_value", "residual"] = Field(
        description="key_value: keys and values travel; residual: inputs of each block travel, half the bytes where every head has keys of its own"
    )
    length: Annotated[int, Field(ge=1, le=8192)] = Field(description="virtual tokens")
    init: str = Field(description="text: activations of real text; normal: random; or a file that fedsp wrote")
    init_text: str | None = Field(None, description="file whose first tokens give the activations; none: the distillation text")
    init_scale: Rate = Field(0.02, description="standard deviation of init = normal")
    projection: Annotated[int, Field(ge=0, le=1 << 16)] = Field(0, description="hidden size of the projection MLP (the authors use 512); 0: none")


class RoundSection(Section):
    """The loop."""

    rounds: Positive = Field(description="rounds")
    clients: Count | None = Field(None, description="clients asked per round; none: all of them; 0: server only")
    min_clients: Count = Field(1, description="accepted updates that a round needs; with fewer the run stops and can be resumed")
    weighting: Literal["examples", "uniform"] = Field("examples", description="weights of the mean, from the server's register of examples")
    max_change: Rate = Field(1.0, description="root mean square by which a reply may differ from the broadcast prompt, per number")
    optimizer: Literal["none", "momentum"] = Field(
        "none", description="what the server does with the aggregated update: none applies it; momentum accumulates it (FedAvgM)"
    )
    learning_rate: LearningRate = Field(1.0, description="server learning rate of momentum, a factor of the accumulated update")
    momentum: Share = Field(0.9, description="server momentum, for optimizer = 'momentum'")

    def asked(self, clients: int) -> int:
        """How many of so many clients a round asks."""
        return clients if self.clients is None else min(self.clients, clients)


class ClientSection(Section):
    """What an asked client does."""

    auxiliary_steps: Count = Field(description="stage 1, steps on its auxiliary model with the prompt frozen; 0: no alternating training")
    prompt_steps: Count = Field(description="stage 2, steps on the prompt with the auxiliary model frozen")
    learning_rate: LearningRate = Field(description="of AdamW on the prompt")
    auxiliary_learning_rate: LearningRate = Field(5e-4, description="of AdamW on the auxiliary model")
    weight_decay: Decay = Field(description="of AdamW")
    batch_size: Batch = Field(16, description="examples per step")
    warmup: Share = Field(0.1, description="share of all steps of all rounds in which the learning rate rises; then it falls linearly to 0; the server's too")
    proximal: Decay = Field(0.0, description="FedProx's mu: half of it times the squared distance from what was received is added to the loss; 0: none")
    keep_optimizer: bool = Field(description="whether AdamW's moments rest with each client, and with the server, between rounds; false: fresh each round")


class ServerSection(Section):
    """What the server does after aggregation, with its own labelled share."""

    steps: Count = Field(description="steps on the prompt through the global model; 0: none")
    learning_rate: LearningRate = Field(description="of AdamW on the prompt")
    weight_decay: Decay = Field(description="of AdamW")
    batch_size: Batch = Field(16, description="examples per step")


class AggregationSection(Section):
    """How the server makes one prompt of many, and what it does not believe."""

    rule: Literal["mean", "median", "trimmed_mean", "krum", "multi_krum", "geometric_median", "centred_clipping", "trust"] = Field(
        "mean", description="mean, or a rule that is robust to malicious clients; trust: by agreement with the server's own step (FLTrust)"
    )
    malicious: Share = Field(
        0.2,
        description="share of the asked clients that may be malicious, rounded down: what a robust rule must withstand; with too few clients for the rule, or for one malicious client, the run is refused",
    )
    mixing: bool = Field(False, description="nearest-neighbour mixing before the rule")
    norm_bound: Decay = Field(0.0, description="a change is cut to this many times the median length of all changes; 0: none is cut")
    max_loss_rise: Decay | None = Field(
        None,
        description="acceptance check: the aggregate is tried on the server's validation questions, and thrown away if its loss is more than this share above the lowest so far; none: no check",
    )

    @field_validator("malicious")
    @classmethod
    def _some_or_none(cls, share: float) -> float:
        if 0 < share < 0.001:
            raise ValueError("less than a thousandth is no client of any federation; set it to 0, or to the share that may lie")
        return share

    @property
    def robust(self) -> bool:
        """Whether it is anything but the plain mean."""
        return self.rule != "mean" or self.mixing or self.norm_bound > 0


class AttackSection(Section):
    """Malicious clients, for simulation."""

    kind: AttackName = Field(
        "none",
        description="none; on updates: sign_flip, gaussian, little_is_enough, inner_product, mimic, scaling, free_rider; on the protocol: stale, duplicate, not_finite, huge, out_of_shape; on data: label_flip, backdoor",
    )
    share: Share = Field(0.2, description="share of the clients that lie, rounded down")
    strength: Rate | None = Field(None, description="how strong: a factor of the change that is sent; none: the usual one of each kind")


class PrivacySection(Section):
    """Differential privacy of the clients' text."""

    unit: Literal["none", "example", "client"] = Field(
        "none",
        description="what neighbouring data sets differ by: example: each client adds noise to its own steps, nobody is trusted with text; client: the server, trusted, adds it to the sum",
    )
    epsilon: Rate | None = Field(None, description="what the whole run may cost; the noise is chosen for it")
    noise_multiplier: Noise | None = Field(None, description="instead of epsilon: standard deviation of the noise, in units of clip")
    delta: float = Field(1e-5, gt=0, lt=1, description="the chance that the promise of epsilon does not hold; well below one in as many units as there are")
    clip: Rate = Field(
        1.0, description="bound on the Euclidean length of an example's gradient, or of a client's whole change; set it on public text, never on private"
    )


CodecName = Literal["float32", "float16", "int8", "int4", "sign"]


class CompressionSection(Section):
    """In which way prompts travel."""

    up: CodecName = Field(
        "float32",
        description="what clients answer: float32: the numbers themselves; or their change in float16, int8, int4, sign, and what that leaves out with the next change",
    )
    down: CodecName = Field("float32", description="what the server broadcasts, likewise, to clients that answered the round before; others get all numbers")


class LoraSection(Section):
    """Low-rank adapters, for method = "lora"."""

    rank: Width = Field(8, description="rank of each adapter")
    alpha: Rate = Field(16.0, description="adapters are scaled by alpha / rank")
    targets: list[str] = Field([], description="names of linear modules, such as c_attn; none: those that PEFT names for the model's family")


class TrackingSection(Section):
    """Where figures and artefacts go besides the run's folder."""

    mlflow: str | None = Field(None, description="tracking URI of MLflow, such as http://host:5000 or sqlite:///mlflow.db; none: nothing is logged there")


class ValidationSection(Section):
    """How the best prompt is chosen. Never by a test split."""

    by: Literal["server", "clients", "none"] = Field(
        "server",
        description="server: loss through the global model; clients: through their auxiliary model on a tenth of their own examples; none: the last prompt is the result",
    )
    examples: Positive = Field(300, description="validation questions used by the server, at most")
    every: Positive = Field(1, description="rounds between validations by the server")


class FederationSection(Section):
    """A deployment: clients on machines of their own. Without this section the clients are simulated from data.train."""

    folder: str = Field(description="certificates, keys and register of clients, as `fedsp federation init` wrote them")
    listen: str = Field("0.0.0.0:8000", description="host:port on which clients reach this machine")
    wait_seconds: Rate = Field(600.0, description="seconds that a round waits for asked clients that are not connected; then it goes on without them")
    again_seconds: Rate = Field(120.0, description="seconds after which a client that has not replied is asked once more, then twice as many; it answers once")
    runs: Positive = Field(1, description="runs that clients answer under one package, which says so and is signed; one that is resumed is the same run")
    reply_seconds: Rate = Field(3600.0, description="seconds that a round waits for replies; later ones are not counted")


class RunConfig(Section):
    """A whole run."""

    preset: Literal["messenger", "paper"] = Field("messenger", description="messenger: fedsp's default; paper: FedSP to the letter")
    profile: Literal["plain", "robust", "dp-example", "dp-client"] = Field(
        "plain",
        description="what is promised against whom: plain; robust: against malicious clients; dp-example, dp-client: differential privacy (docs/security.md)",
    )
    method: str = Field("fedsp", description="fedsp, or a baseline: zero_shot, finetune, prefix_tuning, fedprompt, fedprompt_single, lora, offsite_tuning")
    seed: Count = Field(0, description="every draw of the run comes from it")
    output: str = Field("runs/latest", description="folder of the run")
    model: ModelSection
    data: DataSection
    partition: PartitionSection
    auxiliary: AuxiliarySection
    distill: DistillSection
    prompt: PromptSection
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
    def _together(self) -> RunConfig:
        """What no section can see alone."""
        if self.partition.kind in ("dirichlet", "natural", "pathological") and not (self.partition.column or self.partition.topics):
            raise ValueError(f"partition.column: partition.kind = {self.partition.kind!r} needs the name of a column, or partition.topics")
        if self.partition.column and self.partition.topics:
            raise ValueError("partition.topics: a partition goes by a column or by topics; set one of them")
        if self.partition.clients and self.partition.kind != "natural" and not self.federation and self.privacy.unit != "client":
            asked = self.round.asked(self.partition.clients)
            if asked and self.round.min_clients > asked:
                raise ValueError(f"round.min_clients: {self.round.min_clients} clients must answer, but a round asks {asked}; set it to {asked} at most")
        if self.attack.kind != "none" and self.federation:
            raise ValueError("attack.kind: attacks are simulated, and the clients of a [federation] are real; set it to 'none'")
        if self.aggregation.max_loss_rise is not None and self.validation.by != "server":
            raise ValueError("aggregation.max_loss_rise: the acceptance check needs validation.by = 'server'")
        if self.aggregation.robust and self.round.weighting != "uniform":
            raise ValueError("round.weighting: robust rules give every client the same weight, and neither do mixing and norm_bound; set it to 'uniform'")
        if self.aggregation.rule == "trust" and not self.server.steps:
            raise ValueError("aggregation.rule: trust goes by the server's own step; set server.steps above 0")
        self._private()
        if self.distill.again_every and (self.federation or self.client.auxiliary_steps or not self.distill.steps):
            raise ValueError("distill.again_every: only where clients are simulated, client.auxiliary_steps is 0, and distill.steps is above 0")
        if self.distill.steps and not self.distill.text and not self.auxiliary.folder:
            raise ValueError("distill.text: distillation needs text; name public text files, or ['server'] for the server's own examples")
        if self.prompt.init == "text" and not self.prompt.init_text and not self.distill.text:
            raise ValueError("prompt.init_text: prompt.init = 'text' needs a text; name a file, or set distill.text, or prompt.init = 'normal'")
        if self.validation.by == "clients" and not ((self.partition.clients or self.federation) and self.round.clients != 0):
            raise ValueError("validation.by: no client is asked, so none can validate; use 'server' or 'none'")
        if self.auxiliary.precision != "float32" and (self.client.auxiliary_steps or self.distill.again_every or self.federation):
            raise ValueError(
                f"auxiliary.precision: only simulated clients that leave the auxiliary model as it is can hold it in {self.auxiliary.precision}: set it to float32, or set client.auxiliary_steps and distill.again_every to 0 without a [federation]"
            )
        if self.client.keep_optimizer and self.client.auxiliary_steps == 0 == self.client.prompt_steps:
            raise ValueError("client.keep_optimizer: a client that takes no step has no optimizer to keep")
        return self

    def _private(self) -> None:
        """What would break the promise."""
        _hold_to_promise(self.privacy, self.client, self.prompt, self.validation.by == "clients")
        if self.privacy.unit != "client":
            return
        if self.aggregation.robust:
            raise ValueError(
                "aggregation.rule: with privacy.unit = 'client' the sum is clipped and noised, and no other rule has a bounded sensitivity; set it to 'mean' without mixing and norm_bound"
            )
        if self.round.weighting != "uniform":
            raise ValueError("round.weighting: with privacy.unit = 'client' no client counts more than another; set it to 'uniform'")
        if self.round.min_clients:
            raise ValueError("round.min_clients: with privacy.unit = 'client' a round releases noise however few answer; set it to 0")

    @property
    def server_share(self) -> float:
        """The share of train that is the server's own."""
        if self.federation:
            return 1.0  # what the clients hold is with the clients
        if self.partition.server_share is not None:
            return self.partition.server_share
        if not self.partition.clients:
            return 1.0
        needed = self.server.steps > 0 or "server" in self.distill.text
        return 1 / (self.partition.clients + 1) if needed else 0.0


def _hold_to_promise(privacy: PrivacySection, client: ClientSection, prompt: PromptSection, clients_validate: bool) -> None:
    """What would break the promise of differential privacy, wherever it is asked for: in a run's configuration, and in what a client is asked to agree to."""
    if privacy.unit == "none":
        if privacy.epsilon is not None or privacy.noise_multiplier is not None:
            raise ValueError(
                "privacy.unit: it is 'none', so nothing is noised and privacy.epsilon and privacy.noise_multiplier promise nothing; set it to 'example' or 'client', as the profiles dp-example and dp-client do"
            )
        return
    if (privacy.epsilon is None) == (privacy.noise_multiplier is None):
        raise ValueError("privacy.epsilon: set it, or privacy.noise_multiplier, and not both")
    if clients_validate:
        raise ValueError("validation.by: what clients say of their own examples is not covered by the promise; use 'server' or 'none'")
    if privacy.unit != "example":
        return
    if client.auxiliary_steps:
        raise ValueError(
            "client.auxiliary_steps: alternating training lets every example into the auxiliary model without noise, and from there into every later gradient; set it to 0"
        )
    wrong = {"client.proximal": client.proximal > 0, "prompt.projection": prompt.projection > 0}
    if key := next((key for key, given in wrong.items() if given), None):
        raise ValueError(f"{key}: private steps are taken on the prompt's own numbers alone; set it to 0")


class Agreement(Section):
    """What the owner of the model asks of every client in a run. It is signed with the auxiliary model, so no round can ask for more."""

    method: str = Field("fedsp", description="fedsp")
    privacy: PrivacySection = PrivacySection()
    compression: CompressionSection = CompressionSection()
    seed: Count = Field(description="what a client holds out and how it starts a projection come from it")
    rounds: Positive = Field(description="rounds")
    max_tokens: Positive = Field(description="tokens of one example; longer ones lose their oldest context")
    positions: Literal["hugging_face", "from_zero"] = Field(description="of tokens behind the prompt")
    prompt: PromptSection
    client: ClientSection
    runs: Positive = Field(1, description="runs that a client answers under this package; one that is resumed is the same run")
    clients_validate: bool = Field(description="whether clients hold out a tenth of their examples and report their loss on it")

    @model_validator(mode="after")
    def _kept_by_both_sides(self) -> Agreement:
        """A client refuses what would break the promise, whoever signed it."""
        _hold_to_promise(self.privacy, self.client, self.prompt, self.clients_validate)
        return self


class PackageSection(Section):
    """The auxiliary model, as the owner of the model has handed it over."""

    folder: str = Field("package", description="the folder")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="the digest of the folder, which the owner of the model tells you by another way than the folder")


class PartyDataSection(Section):
    """Your text. It is read on this machine and nowhere else."""

    task: str = Field("multiple_choice", description="as the owner of the model names it: multiple_choice, continuation, completion, arc_easy, ...")
    train: str = Field(description="JSONL or CSV file, .gz too")


class PolicySection(Section):
    """Your own limits: a request outside them is refused."""

    max_rounds: Positive = Field(1000, description="rounds that this client answers under one package, all runs together, at most")
    min_examples: Positive = Field(1, description="with fewer examples than this the client does not take part: few examples are easier to guess from a prompt")
    methods: list[str] = Field(["fedsp"], description="methods that may be asked for")
    plans: list[str] = Field([], description='layer plans of auxiliary models that are accepted, such as ["ends(2)"]; none: any')
    require_differential_privacy: bool = Field(False, description="take part only in runs with differential privacy at the client, example level")
    max_epsilon: Rate | None = Field(
        None,
        description="what all runs together may cost this client's examples, by its own ledger; none: what the package promises that one run costs, times its runs",
    )
    max_delta: float = Field(1e-5, gt=0, lt=1, description="the largest delta at which an epsilon is taken for a promise")

    @model_validator(mode="after")
    def _a_promise_has_a_size(self) -> PolicySection:
        if self.require_differential_privacy and self.max_epsilon is None:
            raise ValueError(
                "policy.max_epsilon: policy.require_differential_privacy asks for nothing without it; set the largest epsilon that you accept, such as 8"
            )
        return self


class PartyConfig(Section):
    """A client of a deployment: `party.toml`."""

    name: str = Field(pattern=NAME, description="this client's name in the server's register")
    server: str = Field(description="host:port of the server")
    keys: str = Field(".", description="folder with ca.crt, server.pub and this client's client.key")
    state: str = Field("state", description="folder for what this client keeps between rounds; it never travels")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    precision: ClientPrecision = Field("float32", description=PRECISION)
    data: PartyDataSection
    package: PackageSection
    policy: PolicySection = PolicySection()
