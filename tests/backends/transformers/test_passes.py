"""Tiny random checkpoints: packing, vocabularies that are padded or others, memory, adapters, names."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from backends.base import ScoreRequest
from backends.errors import ModelNotUsableError
from backends.local.backend import LocalBackend
from backends.transformers.backend import TransformersBackend
from backends.transformers.checkpoints import find_checkpoint
from backends.transformers.loading import Models
from backends.transformers.options import TransformersOptions
from backends.transformers.passes import Passes, Rows
from backends.transformers.reduction import compared, log_total, top_ids
from backends.transformers.tokens import CheckpointTemplate, CheckpointTokenizer
from kl.estimators.divergence import exact_of_padded
from kl.records import Prompt, Score, ScoreFailure, Turn
from tests import ROOT
from tests.backends.transformers.asking import ask, paired, request, scores
from tests.backends.transformers.checkpoints import tiny_model

TEXTS = ["hello", " the", " ", "b", "<|im_end|>", "1", "2", "é", "!"]
NATS = 1e-4


def values(score: Score) -> list[float]:
    return [float(candidate.logprob or 0.0) for candidate in score.top]


def several(model: str, n: int = 5) -> list[ScoreRequest]:
    """Responses of different lengths."""
    made = [request(model, TEXTS[: 2 + number]) for number in range(n)]
    return [replace(one, keys=tuple(f"{key} {number}" for key in one.keys)) for number, one in enumerate(made)]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("other") / "other", seed=1)


def test_answers_do_not_depend_on_what_shares_a_pass(tiny: Path) -> None:
    together, one_by_one = (scores(several(str(tiny)), tokens_per_pass=size) for size in (4096, 1))
    for here, there in zip(together, one_by_one, strict=True):
        assert values(here) == pytest.approx(values(there), abs=NATS)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "longrope", "factor": 8.0, "short_factor": [1.0] * 6, "long_factor": [4.0] * 6},
    ],
    ids=["dynamic", "longrope"],
)
def test_frequencies_do_not_depend_on_what_comes_later(rope: dict[str, Any], tmp_path: Path) -> None:
    if rope["rope_type"] == "longrope":
        rope, longest = rope | {"original_max_position_embeddings": 64}, 512
    else:
        longest = 64
    settings = {"rope_parameters": rope | {"rope_theta": 10_000.0}, "max_position_embeddings": longest}
    model = str(tiny_model(tmp_path / "model", **settings))
    early, whole = request(model, TEXTS[:3]), request(model, [*TEXTS[:3], *["x"] * 80])
    alone, beside = ask([early]), ask([whole])
    assert [values(beside[key]) for key in early.keys] == [pytest.approx(values(alone[key])) for key in early.keys]
    late = beside[whole.keys[-1]]
    assert isinstance(late, ScoreFailure)
    assert late.reason == "context-too-long"
    assert "takes 64" in late.message


def test_models_that_are_forgotten_leave_nothing_behind(tiny: Path, other: Path) -> None:
    import torch

    models, passes = Models(), Passes(None)
    options = TransformersOptions(local_files_only=True)

    def compare() -> None:
        sides = [models.load(find_checkpoint(str(folder), options)) for folder in (tiny, other)]
        rows = [Rows(side, torch.zeros(1, 48), 1, False, [()]) for side in sides]
        ((_, found),) = passes.reduced(rows, pair=True)
        assert np.isfinite(found.figures).all()

    compare()
    assert len(passes._numberings) == 1
    models.release()
    assert not passes._numberings


def test_figures_of_a_pair_are_those_of_the_vocabularies_that_are_kept(tiny: Path, other: Path) -> None:
    p, q = request(str(tiny), TEXTS), request(str(other), TEXTS)
    pairs = scores(paired(p, q))
    kept = scores([replace(p, full_vocabulary=True), replace(q, full_vocabulary=True)])
    n = len(TEXTS)
    full = [np.stack([score.full_logprobs for score in part]) for part in (kept[:n], kept[n:])]  # type: ignore[misc]
    expected = np.stack(exact_of_padded(*full))
    found = np.array([score.exact[1:5] for score in pairs[:n] if score.exact is not None]).T
    turned = np.array([score.exact[1:5] for score in pairs[n:] if score.exact is not None]).T
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(turned, found[[1, 0, 2, 3]])
    assert all(score.full_logprobs is None for score in pairs)
    assert expected[0].min() > 0.01


def test_a_model_under_two_names_differs_by_nothing(tiny: Path) -> None:
    one = request(str(tiny), TEXTS)
    aliased = replace(one, model="mine", keys=tuple(f"mine {key}" for key in one.keys))
    found = scores(paired(one, aliased), models={"mine": {"path": str(tiny)}})
    assert {score.exact[1:5] for score in found if score.exact is not None} == {(0.0, 0.0, 0.0, 0.0)}


def test_reduction_of_padded_rows_is_that_of_the_estimators() -> None:
    import torch

    rng = np.random.default_rng(0)
    p = torch.from_numpy(rng.normal(size=(4, 300)).astype(np.float32) * 3)
    q = torch.cat(
        [p + 0.1 * torch.from_numpy(rng.normal(size=(4, 300)).astype(np.float32)), torch.full((4, 9), -40.0)], 1
    )
    p[0, 3] = q[0, 3] = q[1, 7] = -torch.inf
    q[3, 305] = 3.0  # no padding: it has mass
    totals = log_total(p), log_total(q)
    found = compared(p, q, *totals).numpy()
    with np.errstate(invalid="ignore"):
        expected = np.stack(
            exact_of_padded(*((logits - total).numpy() for logits, total in zip((p, q), totals, strict=True)))
        )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert np.isinf(found[0, 1])
    assert np.isnan(found[:, 3]).all()
    ties = torch.round(p)
    for k in (1, 5, 300):
        assert torch.equal(top_ids(ties, k), torch.sort(ties, dim=1, descending=True, stable=True).indices[:, :k])


def test_a_padded_vocabulary_is_reported_as_it_is(tiny: Path, tmp_path: Path) -> None:
    """Rows that are no tokens keep their mass, are named, and are not sampled."""
    padded = str(tiny_model(tmp_path / "padded", vocab_size=300))
    p, q = request(str(tiny), TEXTS[:2]), request(padded, TEXTS[:2], top_logprobs=300)
    first, _, second, _ = scores(paired(p, q))
    assert first.exact is not None
    assert np.isnan(first.exact.kl)
    assert (first.exact.vocabulary, first.exact.vocabulary_versus) == (266, 300)
    assert {item.token for item in second.top if (item.token_id or 0) >= 266} == {
        f"<unused {at}>" for at in range(266, 300)
    }
    assert np.exp(values(second)).sum() == pytest.approx(1, abs=1e-5)


def test_models_of_two_numberings_have_no_figures(tiny: Path, tmp_path: Path) -> None:
    moved = tiny_model(tmp_path / "moved", seed=2)
    document = json.loads((moved / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (moved / "tokenizer.json").write_text(json.dumps(document))
    found = scores(paired(request(str(tiny), TEXTS[:3]), request(str(moved), TEXTS[:3])))
    assert all(score.exact is not None and np.isnan(score.exact.kl) for score in found)
    assert all(len(score.top) == 20 for score in found)


def test_where_memory_does_not_suffice_passes_become_smaller(tmp_path: Path) -> None:
    """The machine refuses: the process may have little more memory than it has, and one pass would take all of it."""
    wide = str(tiny_model(tmp_path / "wide", intermediate_size=20_000))
    code = f"""
    import logging, resource
    from dataclasses import replace
    from tests.backends.transformers.asking import request, scores
    logging.basicConfig(level=logging.WARNING)
    requests = [request({wide!r}, ["x"] * 200, keys=tuple(f"{{n}} {{t}}" for t in range(200))) for n in range(12)]
    whole = scores(requests[:1], tokens_per_pass=300)
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + 400_000_000, resource.RLIM_INFINITY))
    found = scores(requests, tokens_per_pass=100_000)
    print(max(abs(a.top[0].logprob - b.top[0].logprob) for a, b in zip(whole * 12, found, strict=True)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "memory does not suffice" in done.stderr
    assert float(done.stdout) < NATS


def test_an_adapter_is_a_model_of_its_own(tiny: Path, tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(model, settings).save_pretrained(tmp_path / "adapter")
    named, chosen = (
        f"{tiny}+{tmp_path / 'adapter'}",
        {"mine": {"path": str(tiny), "adapter": str(tmp_path / "adapter")}},
    )
    plain, adapted, alias = (scores([request(name, TEXTS[:3])], models=chosen) for name in (str(tiny), named, "mine"))
    assert [values(score) for score in adapted] == [values(score) for score in alias]
    assert max(abs(a - b) for a, b in zip(values(plain[2]), values(adapted[2]), strict=True)) > 0.01


def test_a_gguf_file_is_the_model_of_the_numpy_engine(tmp_path: Path) -> None:
    """Weights by transformers, tokenizer by `local`: the library's own conversion of that loses rules."""
    place = ROOT / "tests/backends/local/tiny_llama.py"
    spec = importlib.util.spec_from_file_location("tiny_llama_of_transformers", place)
    assert spec is not None
    assert spec.loader is not None
    gguf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gguf)
    file = str(gguf.write(tmp_path / "tiny.gguf", gguf.random_weights(), gguf.metadata()))
    asked = request(file, TEXTS)
    here, there = ask([asked]), ask([asked], LocalBackend)
    for key in asked.keys:
        one, other = here[key], there[key]
        assert isinstance(one, Score)
        assert isinstance(other, Score)
        assert [item[2:] for item in one.top] == [item[2:] for item in other.top]
        assert values(one) == pytest.approx(values(other), abs=NATS)


def test_a_prompt_is_whole_whatever_length_the_tokenizer_keeps(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    prompt = Prompt((Turn("user", "Is a prompt of many bytes cut or filled up?"),))

    def ids(folder: Path) -> list[int]:
        own = AutoTokenizer.from_pretrained(folder)
        return CheckpointTemplate(own, CheckpointTokenizer("a", own), "own", {}, None).encode(prompt)

    shutil.copytree(tiny, tmp_path / "kept")
    for length in (8, 256):
        known = Tokenizer.from_file(str(tiny / "tokenizer.json"))
        known.enable_truncation(length)
        known.enable_padding(length=length)
        known.save(str(tmp_path / "kept/tokenizer.json"))
        assert ids(tmp_path / "kept") == ids(tiny)


# Names and refusals.


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("./nowhere", "there is no folder './nowhere'"),
        ("someone/no-such-model", "is neither a folder here nor in the cache of the hub"),
        ("no/such/file.gguf", "is neither a folder here nor in the cache of the hub"),
    ],
)
def test_what_is_not_there_is_refused_in_a_line(
    name: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelNotUsableError, match=line) as raised:
        find_checkpoint(name, TransformersOptions(local_files_only=True))
    assert "\n" not in str(raised.value)


def test_a_hub_id_is_its_commit(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit, cache = "0123456789abcdef0123456789abcdef01234567", tmp_path / "hub/models--someone--tiny"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text(commit)
    (cache / "snapshots").mkdir()
    (cache / "snapshots" / commit).symlink_to(tiny)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    options = TransformersOptions(local_files_only=True)
    found = find_checkpoint("someone/tiny", options)
    assert (found.base.commit, found.content) == (commit, f"commit {commit}")
    assert find_checkpoint("someone/tiny@main", options).identity() == found.identity()
    assert find_checkpoint(f"someone/tiny@{commit}", options).identity() == found.identity()


def test_other_weights_templates_and_settings_are_other_scores(tiny: Path, tmp_path: Path) -> None:
    def identity(folder: Path, **options: Any) -> str:
        asked = request(str(folder), TEXTS[:1])
        return json.dumps(
            TransformersBackend.identity(TransformersOptions.model_validate(options), asked), sort_keys=True
        )

    alike = tiny_model(tmp_path / "alike")
    others = [
        identity(tiny_model(tmp_path / "weights", seed=3)),
        identity(tiny_model(tmp_path / "template", tokenizer={"chat_template": "{{ messages[0]['content'] }}"})),
        *(identity(tiny, **{name: value}) for name, value in [("dtype", "bfloat16"), ("attn_implementation", "eager"),
          ("template_options", {"enable_thinking": False}), ("today", "2026-11-28")]),
    ]  # fmt: skip
    assert identity(alike) == identity(tiny) == identity(tiny, device="cpu", tokens_per_pass=7)
    assert len({*others, identity(tiny)}) == len(others) + 1


def test_weights_that_the_files_lack_are_not_made_up(tiny: Path, tmp_path: Path) -> None:
    deeper = tiny_model(tmp_path / "deeper")
    config = json.loads((deeper / "config.json").read_text())
    (deeper / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    (failure,) = {(item.reason, item.message) for item in ask([request(str(deeper), TEXTS[:2])]).values()}  # type: ignore[union-attr]
    assert failure[0] == "model-not-usable"
    assert "the files lack 9 of the model's weights" in failure[1]
