"""What a sampling makes of a backend's results."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from backends.base import Backend, BackendOptions, Capabilities, Sample, SampleRequest, ScoreRequest
from backends.errors import ConfigError, ModelNotUsableError
from flows.folder.room import DiskRefusedError, Reserve
from flows.sampling.asking import Sampler, _entries_in_flight
from flows.sampling.files import SAMPLED_BY
from flows.sampling.plan import SamplePlan, plan_rows, plan_sampling
from kl.input.responses import RENDERED, prompt_sha256
from kl.records import Candidate, Position, Prompt, Response, ScoreFailure
from tests.disks import Resize, small_disk
from tests.flows.sampling.test_plan import config

__all__ = ["small_disk"]


class Plugin(Backend):
    """A backend that answers as it is told; ``asked`` are the names it was asked for, a tuple a round."""

    name = "plugin"
    capabilities = Capabilities(20, samples=True)
    weights: ClassVar[str] = "one"
    usd: ClassVar[float] = 0.0
    template: ClassVar[bool] = True
    asked_before_noted: ClassVar[list[int]]
    asked: ClassVar[list[tuple[str, ...]]]
    lost: ClassVar[set[str]]
    failing: ClassVar[set[str]]

    @classmethod
    def identity(cls, options: BackendOptions, request: ScoreRequest) -> dict[str, Any]:
        return super().identity(options, request) | {"weights": cls.weights}

    @classmethod
    def cost_usd(cls, options: BackendOptions, model: str, input_tokens: int, output_tokens: int) -> float | None:
        return cls.usd

    async def rendered_prompt(self, prompt: Prompt, model: str) -> str | None:
        if not self.template:
            raise ModelNotUsableError("no template", model=model)
        self.asked_before_noted.append(len(self.asked))
        return f"<{prompt.turns[-1].content}>"

    async def preflight(self, model: str) -> str | None:
        return None

    def score(self, requests: Sequence[Any]) -> Any:
        raise NotImplementedError

    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncIterator[Sample | ScoreFailure]:
        type(self).asked.append(tuple(request.name for request in requests))
        for request in requests:
            if request.name in self.failing:
                yield ScoreFailure(request.key, "lists-missing", "no lists.")
            elif request.name not in self.lost:
                yield Sample(request.key, response(request))


def response(request: SampleRequest) -> Response:
    token = Candidate("Hi", -0.5, request.index)
    return Response("", 0, request.prompt, request.model, "Hi", (Position(token, (token,)),), "STOP")


def planned(folder: Path, *, lost: tuple[str, ...] = (), failing: tuple[str, ...] = (), **settings: Any) -> SamplePlan:
    Plugin.asked_before_noted = []
    Plugin.asked, Plugin.lost, Plugin.failing = [], set(lost), set(failing)
    return replace(plan_sampling(config(folder, **settings), make_identity=True), backend=Plugin)


def test_a_response_that_a_backend_says_nothing_of_is_missing(tmp_path: Path) -> None:
    report = Sampler(planned(tmp_path, lost=("001_two#1",))).run()
    assert (report.n_responses, report.missing, report.complete) == (3, {"no-result": 1}, False)
    assert [request.name for request in planned(tmp_path).requests] == ["001_two#1"]


def test_a_sampling_that_another_model_began_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    Sampler(planned(tmp_path, lost=("001_two#1",))).run()
    stated = {json.loads(path.read_text())[SAMPLED_BY] for path in out.glob("*.json")}
    assert len(stated) == 1
    monkeypatch.setattr(Plugin, "weights", "two")
    with pytest.raises(ConfigError, match=r"begun with another server or other weights \(changed: weights\)"):
        Sampler(planned(tmp_path)).run()
    shutil.rmtree(out / ".sampling")
    with pytest.raises(ConfigError, match=r"\(001_two.json states another\)"):
        Sampler(planned(tmp_path)).run()
    document = json.loads((out / "001_two.json").read_text())
    del document[SAMPLED_BY]  # as an earlier version wrote it
    (out / "001_two.json").write_text(json.dumps(document))
    assert Sampler(planned(tmp_path)).run().complete
    assert Plugin.asked == [("001_two#1",)]
    assert "1 files that are there come from another server or other weights (000_one.json)" in caplog.text


def test_a_file_is_known_by_its_prompt_when_a_record_before_it_is_mended(tmp_path: Path) -> None:
    Sampler(planned(tmp_path)).run()
    report = Sampler(planned(tmp_path, prompts=["Zero?", "One?", "Two?"])).run()
    assert Plugin.asked == [("003_zero#0", "003_zero#1")]
    assert [Path(path).name for path in report.paths] == ["003_zero.json", "000_one.json", "001_two.json"]


def test_what_is_asked_again_counts_against_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plugin, "usd", 1.0)
    settings: dict[str, Any] = {"sampling": {"max_retries": 2}, "max_cost_usd": 5.5}
    report = Sampler(planned(tmp_path, failing=("001_two#1",), **settings)).run()
    assert report.missing == {"lists-missing": 1}
    assert Plugin.asked == [("000_one#0", "000_one#1", "001_two#0", "001_two#1"), ("001_two#1",)]
    assert "up to 2 more where a response fails" in dict(plan_rows(planned(tmp_path, **settings)))["tries"]


def test_prompts_are_noted_before_anything_is_bought_and_a_failure_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    Sampler(planned(tmp_path)).run()
    assert [json.loads(path.read_text())[RENDERED] for path in sorted((tmp_path / "out").glob("*.json"))] == [
        prompt_sha256("<One?>"),
        prompt_sha256("<Two?>"),
    ]
    assert Plugin.asked_before_noted == [0, 0]
    monkeypatch.setattr(Plugin, "template", False)
    assert Sampler(planned(tmp_path / "other")).run().complete
    assert caplog.text.count("how prompts are written is not known: no template") == 1


class Filling(Plugin):
    """Fills the disk when one response is there; when it is to stop, three are in flight."""

    name = "plugin"
    full: ClassVar[Path]
    in_flight: ClassVar[int | None]
    written: ClassVar[int]

    def stop_asking(self, why: str) -> bool:
        type(self).in_flight = 3
        return True

    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncIterator[Sample | ScoreFailure]:
        kind = type(self)
        for number, request in enumerate(requests):
            if number == 1:
                self.full.write_bytes(b"x" * (shutil.disk_usage(self.full.parent).free // 4096 * 4096))
            if kind.in_flight == 0:
                yield ScoreFailure(request.key, "not-asked", "the disk takes no more.")
                continue
            kind.in_flight = None if kind.in_flight is None else kind.in_flight - 1
            kind.written += 1
            yield Sample(request.key, response(request))


class Refilling(Filling):
    """The room that was kept is taken, too."""

    name = "plugin"

    def stop_asking(self, why: str) -> bool:
        rest = self.full.with_name("rest")
        with suppress(OSError), rest.open("wb") as file:
            while True:
                file.write(b"x" * 4096)
        return super().stop_asking(why)


def test_responses_that_could_be_stored_nowhere_are_counted(
    small_disk: tuple[Path, Resize], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, resize = small_disk
    resize(16_000_000)
    for name, value in (("full", folder / "filler"), ("in_flight", None), ("written", 0)):
        monkeypatch.setattr(Refilling, name, value, raising=False)
    plan = replace(planned(folder, num_responses=50), backend=Refilling)
    with pytest.raises(DiskRefusedError) as ended:
        Sampler(plan).run()
    for name in ("filler", "rest"):
        (folder / name).unlink()
    n_stored = 100 - len(planned(folder, num_responses=50).requests)
    assert Refilling.written - n_stored == ended.value.n_lost >= 3


def test_the_room_that_is_kept_is_that_of_the_responses_in_flight(small_disk: tuple[Path, Resize]) -> None:
    folder, resize = small_disk
    resize(16_000_000)
    with Reserve(folder).kept():
        assert (folder / ".reserve").stat().st_size == 4_000_000
    plan = planned(folder, num_responses=3, sampling={"max_tokens": 8000})
    (request, *_) = plan.requests
    n_entries = _entries_in_flight(replace(plan, options=Concurrent(max_concurrent=4)))
    assert n_entries == 4 * 8000 * (1 + request.settings.top_logprobs)
    with Reserve(folder, 80_000).kept():
        assert (folder / ".reserve").stat().st_size == 12_000_000
    with pytest.raises(OSError, match="18 MB are kept"), Reserve(folder, 120_000).kept():
        pass
    assert not (folder / ".reserve").exists()


class Concurrent(BackendOptions):
    max_concurrent: int


def test_responses_in_flight_are_stored_when_the_disk_is_full(
    small_disk: tuple[Path, Resize], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, resize = small_disk
    resize(16_000_000)
    for name, value in (("full", folder / "filler"), ("in_flight", None), ("written", 0)):
        monkeypatch.setattr(Filling, name, value, raising=False)
    plan = replace(planned(folder, num_responses=50), backend=Filling)
    with pytest.raises(OSError, match="No space left on device"):
        Sampler(plan).run()
    assert 3 < Filling.written < 50
    (folder / "filler").unlink()
    assert len(planned(folder, num_responses=50).requests) == 100 - Filling.written
