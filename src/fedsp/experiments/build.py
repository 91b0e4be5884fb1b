"""Both sides of a method, opened from a configuration: what the server reads through and tunes, and its clients. FedSP, and every baseline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib.util import find_spec

from fedsp.config import Agreement, RunConfig
from fedsp.data.encoding import Encoded, Tokenizer, encode_targets
from fedsp.data.seeding import derive_seed
from fedsp.errors import ConfigurationError
from fedsp.experiments.run_directory import RunDirectory
from fedsp.experiments.server_setup import FederatedDataset, Server, initial_prompt, make_auxiliary, token_limit
from fedsp.federation.callbacks import Callbacks
from fedsp.federation.clients import Clients, absent_clients, agreement_of, client_prompt, make_method, make_party, require_independence, stages
from fedsp.federation.methods.base import Averaging, Method
from fedsp.federation.methods.fedprompt import FedPrompt
from fedsp.federation.methods.fedprompt_single import FedPromptSingle, reading_one_layer
from fedsp.federation.methods.finetune import Finetune, all_weights
from fedsp.federation.methods.offsite_tuning import OffsiteTuning, outer_layers
from fedsp.federation.methods.prefix_tuning import PrefixTuning
from fedsp.federation.methods.zero_shot import ZeroShot
from fedsp.federation.party import Party, Tunable
from fedsp.models.auxiliary import AuxiliaryModel, build_auxiliary, disclosed_share, parse_plan
from fedsp.models.loading import reduce_precision
from fedsp.models.prompted_lm import PromptedLM
from fedsp.models.soft_prompt import PromptSpec, SoftPrompt
from fedsp.models.weights import Weights
from fedsp.privacy import LEDGER, Ledger


@dataclass(frozen=True)
class About:
    """A method for people: its name, its paper, and what its clients hold of the global model."""

    title: str
    paper: str
    clients_hold: str


METHODS: dict[str, About] = {
    "fedsp": About("FedSP", "Dong et al., Findings of EMNLP 2023", "the auxiliary model"),
    "zero_shot": About("zero-shot", "Brown et al., NeurIPS 2020", "nothing"),
    "finetune": About("finetune", "McMahan et al., AISTATS 2017 (federated averaging)", "the whole model"),
    "prefix_tuning": About("prefix-tuning", "Li and Liang, ACL 2021", "nothing"),
    "fedprompt": About("FedPrompt", "Zhao et al., ICASSP 2023", "the whole model"),
    "fedprompt_single": About("FedPrompt-single", "baseline of Dong et al., Findings of EMNLP 2023", "embeddings and one layer"),
    "lora": About("federated LoRA", "Hu et al., ICLR 2022; Zhang et al., ICASSP 2024", "the whole model"),
    "offsite_tuning": About("offsite-tuning", "Xiao, Lin and Han, 2023; FATE-LLM, 2023", "first and last layers, a compressed middle"),
}


@dataclass
class Federation:
    """A method and its parties. `handed_out` is the share of the global model's numbers that clients hold bit for bit."""

    method: Method
    model: PromptedLM
    tuned: Tunable
    clients: Clients
    auxiliary: AuxiliaryModel | None = None
    handed_out: float = 0.0


def server_side(server: Server) -> tuple[PromptedLM, Tunable]:
    """The global model as a method's server reads it, and what is tuned of it or in front of it, as it is in round 1.

    Raises:
        FedspError: the configuration does not fit the model.
    """
    config, model = server.config, server.model
    plan = parse_plan(config.auxiliary.plan, model.shape.layers, config.auxiliary.prompt_layers)
    if config.method == "zero_shot":
        return model, Weights({})
    if config.method == "finetune":
        return model, all_weights(model)
    if config.method == "lora":
        _require_peft()
        from fedsp.federation.methods.lora import low_rank_adapters

        section = config.lora
        seed = derive_seed(config.seed, "lora")
        return model, low_rank_adapters(model, rank=section.rank, alpha=section.alpha, targets=section.targets, seed=seed)
    if config.method == "offsite_tuning":
        outer = [source for source, frozen in zip(plan.sources, plan.frozen, strict=True) if frozen]
        return model, outer_layers(model, outer, outer)
    prompt = initial_prompt(server)
    if config.method == "fedprompt_single":
        one = reading_one_layer(model)
        return one, _prompt_like(prompt, one, config)
    return model, prompt


def _require_peft() -> None:
    if find_spec("peft") is None:
        raise ConfigurationError("peft is not installed: method = 'lora' needs `pip install 'fedsp[study]'`")


def _prompt_like(prompt: SoftPrompt, model: PromptedLM, config: RunConfig) -> SoftPrompt:
    """A prompt with the first layers of another's values, as many as `model` reads."""
    spec = PromptSpec(prompt.spec.space, prompt.spec.length, model.prompt_shape, prompt.spec.projection)
    return SoftPrompt(spec, prompt.values()[:, : model.prompt_shape.layers], seed=derive_seed(config.seed, "prompt")).to(model.device)


def build_federation(server: Server, run: RunDirectory, watcher: Callbacks, register: dict[str, int] | None) -> Federation:
    """Both sides of the run's method. With a `register` the clients' text is elsewhere.

    Raises:
        FedspError: whatever cannot be opened.
    """
    asks = bool(server.questions.partition.clients if register is None else register) and server.config.round.clients != 0
    if server.config.method == "fedsp":
        return _fedsp(server, run, watcher, register, asks)
    return _baseline(server, run, watcher, asks)


def _fedsp(server: Server, run: RunDirectory, watcher: Callbacks, register: dict[str, int] | None, asks: bool) -> Federation:
    config = server.config
    auxiliary = make_auxiliary(server, run.auxiliary, watcher) if asks else None
    model, tuned = server_side(server)
    assert isinstance(tuned, SoftPrompt)
    handed_out = _handed_out(server, auxiliary)
    if auxiliary:
        reduce_precision(auxiliary, config.auxiliary.precision, "auxiliary.precision")
    agreement = agreement_of(config, server.max_tokens)
    method = make_method(agreement, auxiliary, config.server)
    if auxiliary and register is None:
        clients = replace(open_clients(config, auxiliary, server.questions, run), method=method)
    else:
        clients = absent_clients(method, register or {})
    return Federation(method, model, tuned, clients, auxiliary, handed_out)


def _handed_out(server: Server, auxiliary: AuxiliaryModel | None) -> float:
    """The share of the global model's numbers that clients hold, as it was found when the package was made: here the numbers may be rounded, or elsewhere."""
    if auxiliary is None:
        return 0.0
    if auxiliary.discloses is not None:
        return auxiliary.discloses
    if server.config.model.precision in ("8bit", "4bit") or server.config.model.device == "split":
        raise ConfigurationError(
            "auxiliary.folder: the package does not say what it discloses, as an earlier version made it: make it again with `fedsp distill`"
        )
    return disclosed_share(auxiliary, server.model)


AVERAGING: dict[str, type[Averaging]] = {
    "finetune": Finetune,
    "prefix_tuning": PrefixTuning,
    "fedprompt": FedPrompt,
    "fedprompt_single": FedPromptSingle,
    "offsite_tuning": OffsiteTuning,
}


def make_averaging(config: RunConfig) -> Method:
    """The baseline that a configuration names, with its numbers."""
    if config.method == "zero_shot":
        return ZeroShot()
    if config.method == "lora":
        from fedsp.federation.methods.lora import FederatedLoRA

        kind: type[Averaging] = FederatedLoRA
    else:
        kind = AVERAGING[config.method]
    steps = stages(config.client, config.server, config.round.rounds)
    return kind(client=steps["speak"], server=steps["server"], keep_optimizer=config.client.keep_optimizer)


def _baseline(server: Server, run: RunDirectory, watcher: Callbacks, asks: bool) -> Federation:
    config, questions = server.config, server.questions
    model, tuned = server_side(server)
    method = make_averaging(config)
    if not asks or config.method == "zero_shot":
        return Federation(method, model, tuned, absent_clients(method, {}))
    reads, auxiliary, handed_out = model, None, 1.0
    own: Callable[[], Tunable] = lambda: tuned  # one model in this process: each party loads what it received before it does anything
    if config.method == "fedprompt_single":
        auxiliary = build_auxiliary(server.model, parse_plan([0], server.model.shape.layers), server.tokenizer)
        auxiliary.prompt_shape = model.prompt_shape
    elif config.method == "offsite_tuning":
        auxiliary = make_auxiliary(server, run.auxiliary, watcher)
        plan = auxiliary.plan
        depths = [depth for depth, frozen in enumerate(plan.frozen) if frozen]
        outer = outer_layers(auxiliary, depths, [plan.sources[depth] for depth in depths])
        own = lambda: outer
    if auxiliary:
        reads, handed_out = auxiliary, disclosed_share(auxiliary, server.model)
    if isinstance(tuned, SoftPrompt):
        own = partial(_prompt_like, tuned, reads, config)
    clients = clients_here(method, agreement_of(config, server.max_tokens), reads, server.tokenizer, own, questions, run)
    return Federation(method, model, tuned, clients, auxiliary, handed_out)


def open_clients(config: RunConfig, auxiliary: AuxiliaryModel, questions: FederatedDataset, run: RunDirectory) -> Clients:
    """Every client of a run of FedSP in one process."""
    agreement = agreement_of(config, token_limit(config, auxiliary))
    method = make_method(agreement, auxiliary, config.server)
    return clients_here(method, agreement, auxiliary, auxiliary.tokenizer, partial(client_prompt, agreement, auxiliary), questions, run)


def clients_here(
    method: Method, agreement: Agreement, model: PromptedLM, tokenizer: Tokenizer, tuned: Callable[[], Tunable], questions: FederatedDataset, run: RunDirectory
) -> Clients:
    """Clients in this process. Parties are made when asked for, from rows and what rests on disk; few stay in memory.

    Raises:
        PrivacyError: something is promised to each example, and the model does not read one by itself.
    """
    if agreement.privacy.unit == "example":
        require_independence(model, tuned(), agreement.max_tokens)

    @lru_cache(maxsize=32)
    def encoded(client: str) -> list[Encoded]:
        return encode_targets(tokenizer, questions.held_by(client), agreement.max_tokens)

    def party(client: str) -> Party:
        rest = run.rest(f"client {client}")
        made = make_party(client, agreement, model, tuned(), encoded(client), rest)
        return replace(made, ledger=Ledger(rest.folder / LEDGER)) if agreement.privacy.unit == "example" else made

    return Clients(method, {client: len(rows) for client, rows in questions.partition.clients.items()}, party)
