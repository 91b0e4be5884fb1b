"""The package: the folder that every client gets once, out of band. It holds the auxiliary model,
the agreement (what the run requires of its clients), and the signature of the model's owner over
both."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from fedsp.config import Agreement, PackageSection, PolicySection
from fedsp.config_file import checked_options, validated
from fedsp.deployment.package_check import require_harmless
from fedsp.deployment.parties.credentials import sign, verify
from fedsp.errors import (
    AuxiliaryError,
    ConfigurationError,
    CredentialError,
    FedspError,
    PolicyError,
    did_you_mean,
    first_line,
)
from fedsp.models.auxiliary import AuxiliaryModel, chosen_counts, load_auxiliary, parse_plan
from fedsp.models.loading import require_vocabulary
from fedsp.models.messengers.registry import require_messenger
from fedsp.models.prompted_lm import Positions
from fedsp.storage import parse_json, write_bytes, write_json

AGREEMENT, SIGNATURE = "agreement.json", "signature"


def package_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of all files of a package but its signature.

    Raises:
        AuxiliaryError: the folder is not there, or holds anything but plain files.
    """
    if not folder.is_dir():
        raise AuxiliaryError(
            f"there is no package {folder}: get the folder from the owner of the model"
        )
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not path.is_file():
            raise AuxiliaryError(
                f"the package {folder} holds {path.name}, which is no plain file: get the folder"
                " again from the owner of the model"
            )
        if path.name != SIGNATURE:
            digest.update(
                f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode()
            )
    return digest.hexdigest()


def seal_package(folder: Path, agreement: Agreement, signing_key: Path) -> str:
    """Add the agreement and the signature to an auxiliary model's folder; returns the digest that
    clients pin.

    Raises:
        AuxiliaryError: it holds what clients refuse.
        CredentialError: the key cannot be used.
        StorageError: the disk did not take it.
    """
    write_json(folder / AGREEMENT, agreement.model_dump())
    require_harmless(folder)
    digest = package_digest(folder)
    write_bytes(folder / SIGNATURE, sign(_statement(digest), signing_key).encode())
    return digest


def read_agreement(folder: Path) -> Agreement:
    """What a package says that the run asks of its clients.

    Raises:
        AuxiliaryError: it says nothing, so it is a bare auxiliary model.
        ConfigurationError: it asks for what cannot be, or for a messenger that is not installed.
    """
    try:
        values = parse_json((folder / AGREEMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AuxiliaryError(
            f"{folder} is not a valid package: its {AGREEMENT} cannot be read; `fedsp distill`"
            " makes one from a run.toml with a [federation] section"
        ) from error
    agreed = validated(Agreement, values, str(folder / AGREEMENT))
    messenger = agreed.messenger
    private = agreed.privacy.unit == "example"
    try:
        require_messenger(messenger.kind, layers=messenger.layers, private=private)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"the package in {folder} asks for what cannot be done here: {error}; a messenger that"
            " an installed package brings must be installed at the server and at every client"
        ) from error
    checked = checked_options(messenger, str(folder / AGREEMENT))
    return agreed.model_copy(update={"messenger": checked})


def open_package(
    section: PackageSection, public_key: Path, device: torch.device
) -> tuple[AuxiliaryModel, Agreement]:
    """The auxiliary model and the agreement of a package that is the one pinned, and signed by the
    model's owner.

    Raises:
        AuxiliaryError: the folder is incomplete, or is not the one whose digest was pinned.
        CredentialError: the signature is missing or not the owner's.
    """
    folder = Path(section.folder)
    digest = package_digest(folder)
    if digest != section.sha256:
        raise AuxiliaryError(
            f"the package {folder} has the SHA-256 digest {digest}, package.sha256 says"
            f" {section.sha256}: get the folder again, or ask the owner of the model for"
            " the digest of a new one"
        )
    try:
        signature = (folder / SIGNATURE).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise CredentialError(
            f"the package {folder} is not signed: get the folder again from the owner of the model"
        ) from error
    try:
        verify(_statement(digest), signature, public_key)
    except CredentialError as error:
        raise CredentialError(f"the package {folder} is refused: {error}") from error
    agreement = read_agreement(folder)
    return load_foreign(folder, device=device, positions=agreement.positions), agreement


def load_foreign(folder: Path, *, device: torch.device, positions: Positions) -> AuxiliaryModel:
    """The auxiliary model of a package that somebody else made, whatever they put into it.

    Raises:
        AuxiliaryError: it cannot be used.
    """
    require_harmless(folder)
    try:
        auxiliary = load_auxiliary(folder, device=device, positions=positions)
        require_vocabulary(auxiliary, auxiliary.tokenizer)
        return auxiliary
    except FedspError:
        raise
    except Exception as error:  # whatever an owner of a model puts into a package
        raise AuxiliaryError(
            f"the package {folder} cannot be used ({type(error).__name__}: {first_line(error)}):"
            " ask the owner of the model"
        ) from error


def hold_against_policy(
    policy: PolicySection, agreement: Agreement, auxiliary: AuxiliaryModel, examples: int
) -> None:
    """Check what a run asks of a client against the client's own policy.

    Raises:
        PolicyError: the first point that the policy does not allow.
    """
    if agreement.method not in policy.methods:
        raise PolicyError(
            f"the run's method is {agreement.method!r}, policy.methods allows"
            f" {policy.methods}{did_you_mean(agreement.method, policy.methods)}"
        )
    if agreement.rounds > policy.max_rounds:
        raise PolicyError(
            f"the run has {agreement.rounds} rounds, policy.max_rounds allows {policy.max_rounds}"
        )
    if examples < policy.min_examples:
        raise PolicyError(
            f"data.train holds {examples} examples, policy.min_examples asks for"
            f" {policy.min_examples} before anything is trained on them"
        )
    privacy, budget = agreement.privacy, policy.max_epsilon
    private = privacy.unit == "example"
    if policy.require_differential_privacy and not private:
        raise PolicyError(
            "the run has no differential privacy at the client, policy.require_differential_privacy"
            " asks for it"
        )
    if budget is not None and not private:
        raise PolicyError(
            "the run has no differential privacy at the client, so no epsilon holds, and"
            f" policy.max_epsilon = {budget:g} asks for one"
        )
    if budget is not None and privacy.epsilon is not None and privacy.epsilon > budget:
        raise PolicyError(
            f"the run may cost epsilon = {privacy.epsilon:g}, policy.max_epsilon allows {budget:g}"
        )
    if private and privacy.delta > policy.max_delta:
        raise PolicyError(
            f"the run promises its epsilon at delta = {privacy.delta:g}, policy.max_delta allows"
            f" {policy.max_delta:g}: ask the owner of the model for a smaller delta, or raise it"
        )
    if any(chosen_counts(plan) for plan in policy.plans):
        raise PolicyError(
            f"policy.plans = {policy.plans}: chosen(n) names no layers, so no package can be held"
            f" against it; write the layers themselves, {list(auxiliary.plan.sources)} for this"
            " package, or emulator(1, [2, 5]) where the ends are the global model's own"
        )
    if policy.plans and auxiliary.plan not in [
        parse_plan(plan, auxiliary.prompt_shape.layers) for plan in policy.plans
    ]:
        raise PolicyError(
            f"the auxiliary model has the layer plan {list(auxiliary.plan.sources)}, policy.plans"
            f" allows {policy.plans}"
        )


def _statement(digest: str) -> bytes:
    return f"fedsp package 1\n{digest}\n".encode()
