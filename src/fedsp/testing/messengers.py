"""What a messenger of your own must do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsp.config import RunConfig
from fedsp.config_file import make_config
from fedsp.data.encoding import Encoded, collate
from fedsp.errors import FedspError, PayloadError
from fedsp.experiments.embedded import EMBEDDED
from fedsp.experiments.plan import travelling
from fedsp.federation.clients import prompt_spec
from fedsp.federation.methods.registry import find_method
from fedsp.models.adapter import global_blocks
from fedsp.models.auxiliary import build_auxiliary, parse_plan
from fedsp.models.loading import load_model, load_tokenizer
from fedsp.models.messengers import registry as messengers
from fedsp.models.messengers.making import blocks_of, client_messenger, make_messenger
from fedsp.models.messengers.registry import MessengerEntry, Place
from fedsp.models.payload import Payload, shapes_of
from fedsp.models.prompted_lm import PromptedLM, hidden_at_depths
from fedsp.models.shape_counts import count_shapes
from fedsp.models.soft_prompt import SoftPrompt
from fedsp.models.trainable import Messenger
from fedsp.storage import tensors_digest
from fedsp.testing.faults import require, require_kind
from fedsp.testing.methods import known, run_faults, small_run
from fedsp.training.loop import gradients_set
from fedsp.training.per_example_gradients import example_gradients, example_losses


def check_messenger(entry: MessengerEntry, **changes: Any) -> None:
    """A messenger, at the server and at a client alike: changes nothing when it is made, and adds
    no parameters to the model; has the tensors that its entry counts, under the same names; is made
    alike from one seed; takes its own payload, keeps a copy, and refuses any other; is read by its
    model, each tensor of it, and not before `first_depth`; `distance` is right; where the entry
    says so, it lives in distilled layers too and has the gradient of each example. And FedSP with
    it does what `check_method` asks of a method. Several seconds.

    changes: sections of the configuration that it needs, such as `messenger={"rank": 4}`.

    Raises:
        Nonconforming: what is missing.
    """
    require_kind(entry, MessengerEntry)
    method = find_method("fedsp")
    given = changes.get("messenger", {})
    sections = {**changes, "messenger": {**given, "kind": entry.name}}
    places = ["verbatim", "all"] if entry.distilled_layers else ["verbatim"]
    with known(entry, messengers._ENTRIES):
        faults: list[str] = []
        try:
            for layers in [given["layers"]] if "layers" in given else places:
                where = {**sections, "messenger": {**sections["messenger"], "layers": layers}}
                config = make_config(small_run(method, Path("unused"), where))
                faults += [one for one in _messenger_faults(entry, config) if one not in faults]
        except FedspError as error:
            faults.append(str(error))
        except Exception as error:  # a messenger raises what it likes
            faults.append(f"using it fails: {error!r}")
        require(f"the messenger {entry.name!r}", faults or run_faults(method, sections))


def _messenger_faults(entry: MessengerEntry, config: RunConfig) -> list[str]:
    name = str(EMBEDDED / "model")
    model, again = (load_model(name, device="cpu") for _ in range(2))
    plan = parse_plan(config.auxiliary.plan, model.shape.layers)
    section, spec = config.messenger, prompt_spec(config.prompt, model.shape)
    settings = section.model_dump()

    def at_server(model: PromptedLM) -> Messenger:
        blocks = global_blocks(blocks_of(plan, section.layers) if entry.in_layers else [])
        return make_messenger(
            Place(
                model=model,
                blocks=blocks,
                prompt=lambda: SoftPrompt(spec, seed=config.seed),
                settings=settings,
                seed=config.seed,
            )
        )

    names, plain = list(model.model.state_dict()), _states(model, None)[-1]
    server = at_server(model)
    functions = [name for name, one in vars(Messenger).items() if callable(one) and name[0] != "_"]
    if lacking := [name for name in functions if not hasattr(server, name)]:
        return [f"it has no {', '.join(lacking)}: make it a subclass of fedsp.Messenger"]
    if list(model.model.state_dict()) != names:
        return [
            "it adds parameters or buffers to the model: keep them in the messenger, and let hooks"
            " of the model's modules read them"
        ]
    if not torch.equal(_states(model, None)[-1], plain):
        return ["the model reads a text otherwise once it is made: begin as if it were not there"]
    auxiliary = build_auxiliary(model, plan, load_tokenizer(name))
    client = client_messenger(auxiliary, spec, settings, config.seed)()
    payload = server.payload()
    counts = count_shapes(name, config.auxiliary.plan, None)
    expected = {name: tuple(shape) for name, shape in travelling(config, counts).items()}
    faults = []
    if shapes_of(client.payload()) != shapes_of(payload):
        faults.append(
            "a client's tensors have other names or shapes than the server's: name them after the"
            " numbers of the global model's layers"
        )
    if expected != shapes_of(payload):
        faults.append("shapes() counts other tensors than payload() has")
    if any(tensor.dtype != torch.float32 or tensor.is_cuda for tensor in payload.values()):
        faults.append("payload() has tensors that are not float32 on the CPU")
    if tensors_digest(at_server(again).payload()) != tensors_digest(payload):
        faults.append("a second one from the same seed begins with other numbers")
    if faults:
        return faults
    for side, messenger, reader in (("server", server, model), ("client", client, auxiliary)):
        found = _faults_of_one(messenger, reader, payload, per_example=entry.per_example)
        faults += [f"at the {side}, {fault}" for fault in found]
    return faults


def _faults_of_one(
    messenger: Messenger, model: PromptedLM, payload: Payload, *, per_example: bool
) -> list[str]:
    faults = []
    drawn = torch.Generator().manual_seed(0)
    moved = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=drawn)
        for name, tensor in payload.items()
    }
    messenger.load(payload)
    first = _states(model, messenger)
    taken = {name: tensor.clone() for name, tensor in moved.items()}
    messenger.load(taken)
    for tensor in (*taken.values(), *messenger.payload().values()):
        tensor.add_(1.0)
    if tensors_digest(messenger.payload()) != tensors_digest(moved):
        faults.append("payload() is not what load() took, or one of them keeps no copy")
    far = sum(float((moved[name] - payload[name]).square().sum()) for name in payload)
    with gradients_set(messenger.trained().values(), True):
        distances = [messenger.distance(one) for one in (moved, payload)]
        if not all(isinstance(one, Tensor) and one.requires_grad for one in distances):
            faults.append("distance() has no gradient")
        near, found = (float(torch.as_tensor(one).detach()) for one in distances)
    if abs(near) > 1e-9 or abs(found - far) > 1e-3 * far:
        faults.append(
            f"distance() is {near:g} from its own payload and {found:g} from another, expected 0"
            f" and {far:g}, the sum of the squares"
        )
    states = _states(model, messenger)
    unread = [name for name in payload if not _is_read(messenger, model, moved, name, payload)]
    if unread:
        faults.append(f"the model reads a text as before where {unread[0]} is another")
    messenger.load(moved)
    depth = messenger.first_depth
    changed = [at for at in range(depth) if not torch.equal(states[at + 1], first[at + 1])]
    if changed:
        faults.append(f"first_depth is {depth}, and what block {changed[0]} gives depends on it")
    faults += _refused(messenger, moved)
    if per_example and not faults:
        faults += _unlike_alone(messenger, model, moved)
    return faults


def _states(model: PromptedLM, messenger: Messenger | None) -> list[Tensor]:
    """What each block reads of a text, and what the last gives."""
    tokens = model.some_tokens()
    with torch.no_grad():
        prefix = messenger.prefix(model) if messenger else None
        return hidden_at_depths(model, tokens, torch.ones_like(tokens), prefix)


def _is_read(
    messenger: Messenger, model: PromptedLM, moved: Payload, name: str, payload: Payload
) -> bool:
    messenger.load(moved)
    whole = _states(model, messenger)[-1]
    messenger.load({**moved, name: payload[name]})
    return not torch.equal(_states(model, messenger)[-1], whole)


def _unlike_alone(messenger: Messenger, model: PromptedLM, payload: Payload) -> list[str]:
    """What is wrong with the gradients of examples that are read together, each by its own copy."""
    some = [Encoded(tuple(range(3, 3 + length)), 2) for length in (9, 5)]
    messenger.load(payload)
    before = _states(model, messenger)[-1]
    parameters = dict(sorted(messenger.trained().items()))
    alone = []
    for example in some:
        with gradients_set(parameters.values(), True):
            loss = example_losses(model, messenger.prefix(model), collate([example])).sum()
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        if any(part is None for part in found):
            return ["a tensor of trained() has no gradient of the loss"]
        alone.append(torch.cat([part.flatten() for part in found]))
    try:
        together = example_gradients(model, messenger, collate(some))[1].flatten(start_dim=1)
    except Exception as error:  # as above
        return [f"reading a batch within apart() fails: {error!r}"]
    near = 1e-3 * torch.stack(alone).norm()
    if together.shape != (2, len(alone[0])) or (together - torch.stack(alone)).norm() > near:
        return [
            "the gradients of apart()'s copies are not those of each example alone: each row must"
            " read its own copy, and trained() must have the names of payload()"
        ]
    if not torch.equal(_states(model, messenger)[-1], before):
        return ["the model reads a text otherwise once apart() has ended"]
    return []


def _refused(messenger: Messenger, payload: Payload) -> list[str]:
    """What is wrong with how a messenger takes payloads that are not its own."""
    name = next(iter(payload))
    for other, words in (
        ({**payload, "more": torch.zeros(1)}, "one tensor too many"),
        ({key: tensor for key, tensor in payload.items() if key != name}, "a missing tensor"),
        ({**payload, name: payload[name][None]}, "another shape"),
        ({**payload, name: payload[name].double()}, "another type"),
        ({**payload, name: payload[name] * float("nan")}, "numbers that are not finite"),
    ):
        try:
            messenger.load(other)
        except PayloadError:
            continue
        except Exception as error:  # as above
            return [f"load() of {words} raises {error!r}, expected a PayloadError"]
        return [f"load() takes a payload with {words}"]
    return []
