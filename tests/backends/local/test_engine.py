"""The engine against an independent, slow one; its bits; the GGUF reader against gguf's."""

from __future__ import annotations

import importlib.util
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gguf")

import gguf
import threadpoolctl
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.errors import ModelNotUsableError
from backends.local import rows as kept_rows
from backends.local.blas import CHUNK, find_period, places, spread
from backends.local.config import LlamaConfig, check_shapes
from backends.local.engine import AT_ONCE, Llama, log_softmax
from backends.local.gguf import GROUP, content_hash, read_gguf, round_in_groups
from backends.local.rows import Cache, Chunk
from tests import ROOT


def _sibling(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


tiny = _sibling("tiny_llama")
IDS = np.random.default_rng(5).integers(3, 260, 2 * CHUNK + 9).tolist()


def slow_logprobs(weights: dict[str, np.ndarray], values: dict[str, Any], ids: list[int]) -> np.ndarray:
    """Float64, one position and one head at a time: the definition, without a cache, a chunk or a batch."""
    w = {name: tensor.astype(np.float64) for name, tensor in weights.items()}
    eps, base = values["llama.attention.layer_norm_rms_epsilon"], values["llama.rope.freq_base"]
    rotated, factor = values["llama.rope.dimension_count"], values.get("llama.rope.scaling.factor", 1.0)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).sum() / len(x) + eps) * w[name]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return w[f"{name}.weight"] @ x + w.get(f"{name}.bias", 0.0)

    def rope(head: np.ndarray, position: int) -> np.ndarray:
        out = head.copy()
        for pair in range(rotated // 2):
            angle = position / factor * base ** (-2 * pair / rotated)
            if "rope_freqs.weight" in w:
                angle /= w["rope_freqs.weight"][pair]
            a, b = head[2 * pair], head[2 * pair + 1]
            out[2 * pair] = a * np.cos(angle) - b * np.sin(angle)
            out[2 * pair + 1] = a * np.sin(angle) + b * np.cos(angle)
        return out

    xs = [w["token_embd.weight"][index] for index in ids]
    for layer in range(tiny.LAYERS):
        block = f"blk.{layer}."
        hs = [norm(x, block + "attn_norm.weight") for x in xs]
        keys, vals = [], []
        for position, h in enumerate(hs):
            k = linear(h, block + "attn_k").reshape(tiny.KV_HEADS, tiny.HEAD_DIM)
            keys.append([rope(head, position) for head in k])
            vals.append(linear(h, block + "attn_v").reshape(tiny.KV_HEADS, tiny.HEAD_DIM))
        for position, h in enumerate(hs):
            heads = []
            for head, q in enumerate(linear(h, block + "attn_q").reshape(tiny.HEADS, tiny.HEAD_DIM)):
                shared = head // (tiny.HEADS // tiny.KV_HEADS)
                turned = rope(q, position)
                past = [turned @ keys[at][shared] / np.sqrt(tiny.HEAD_DIM) for at in range(position + 1)]
                weight = np.exp(np.array(past) - max(past))
                weight /= weight.sum()
                heads.append(sum(weight[at] * vals[at][shared] for at in range(position + 1)))
            xs[position] = xs[position] + linear(np.concatenate(heads), block + "attn_output")
            h = norm(xs[position], block + "ffn_norm.weight")
            gate = linear(h, block + "ffn_gate")
            xs[position] = xs[position] + linear(
                gate / (1 + np.exp(-gate)) * linear(h, block + "ffn_up"), block + "ffn_down"
            )
    output = w.get("output.weight", w["token_embd.weight"])
    logits = np.stack([output @ norm(x, "output_norm.weight") for x in xs])
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@dataclass(frozen=True)
class Variant:
    id: str
    weights: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


VARIANTS = [
    Variant("grouped queries, tied output"),
    Variant("separate output, linear rope scaling", {"tied": False},
            {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0}),
    Variant("biases and the rope factors of Llama 3", {"bias": True, "freqs": True}),
    Variant("rope on half of each head", {"rotated": 16}, {"llama__rope__dimension_count": 16}),
]  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.id)
def test_every_position_agrees_with_a_slow_float64_implementation(tmp_path: Path, variant: Variant) -> None:
    weights, values = tiny.random_weights(**variant.weights), tiny.metadata(**variant.values)
    file = read_gguf(tiny.write(tmp_path / "m.gguf", weights, values))
    check_shapes(file, LlamaConfig.from_gguf(file))
    found = all_rows(Llama(file), IDS)
    expected = slow_logprobs(weights, values, IDS)
    assert np.abs(found - expected).max() < 2e-4  # nats; float32 against float64 over logits of up to 30
    assert np.abs(found - expected).mean() < 2e-5


def all_rows(model: Llama, ids: list[int]) -> np.ndarray:
    rows = [row for chunk in model.logprobs(ids, range(len(ids))) for row in chunk]
    assert [index for index, _ in rows] == list(range(len(ids)))
    return np.stack([logprobs for _, logprobs in rows])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("m") / "m.gguf", tiny.random_weights(tied=False), tiny.metadata())


@pytest.fixture(scope="module")
def reference(small: Path) -> np.ndarray:
    return all_rows(Llama(read_gguf(small)), IDS)


def test_a_row_has_the_same_bits_whatever_follows_it(small: Path, reference: np.ndarray) -> None:
    for length in (1, CHUNK - 1, CHUNK, CHUNK + 1, len(IDS) - 1):
        changed = [*IDS[:length], *(3 for _ in IDS[length:])]
        assert np.array_equal(all_rows(Llama(read_gguf(small)), IDS[:length]), reference[:length])
        assert np.array_equal(all_rows(Llama(read_gguf(small)), changed)[:length], reference[:length])


@pytest.mark.parametrize("rows", [[0], [CHUNK - 1, CHUNK], [len(IDS) - 1], [3, 2 * CHUNK + 1]], ids=str)
def test_asking_for_some_rows_gives_the_bits_of_asking_for_all(
    small: Path, reference: np.ndarray, rows: list[int]
) -> None:
    found = dict(row for chunk in Llama(read_gguf(small)).logprobs(IDS, rows) for row in chunk)
    assert sorted(found) == rows
    assert all(np.array_equal(found[row], reference[row]) for row in rows)


def test_a_pass_resumed_from_the_one_before_has_the_bits_of_a_fresh_one(small: Path, reference: np.ndarray) -> None:
    model = Llama(read_gguf(small))
    other = [*IDS[: CHUNK + 5], *reversed(IDS[CHUNK + 5 :])]
    all_rows(model, IDS)
    resumed = dict(row for chunk in model.logprobs(other, [len(other) - 1]) for row in chunk)
    assert np.array_equal(resumed[len(other) - 1], all_rows(Llama(read_gguf(small)), other)[-1])
    again = dict(row for chunk in model.logprobs(IDS, [len(IDS) - 1]) for row in chunk)
    assert np.array_equal(again[len(IDS) - 1], reference[-1])
    assert np.array_equal(all_rows(model, IDS), reference)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_contexts_that_are_computed_together_have_the_bits_of_each_alone(
    small: Path, reference: np.ndarray, threads: int
) -> None:
    contexts = [IDS, [*IDS[: CHUNK + 5], *reversed(IDS[CHUNK + 5 :])], IDS[5:], IDS[: CHUNK + 7]]
    model = Llama(read_gguf(small))
    chunks = [Chunk(ids, start) for ids in contexts for start in range(0, len(ids), CHUNK)]
    with threadpoolctl.threadpool_limits(threads):
        found = model.hidden(chunks)
    alone = {id(ids): all_rows(Llama(read_gguf(small)), ids) for ids in contexts}
    assert np.array_equal(alone[id(IDS)], reference)
    for chunk, hidden in zip(chunks, found, strict=True):
        rows = [log_softmax(row) for row in model.logits(hidden, range(chunk.start, chunk.end))]
        assert np.array_equal(rows, alone[id(chunk.ids)][chunk.start : chunk.end])


@st.composite
def branching(draw: st.DrawFn) -> list[list[int]]:
    """Contexts of which some begin as others do."""
    found: list[list[int]] = []
    for _ in range(draw(st.integers(1, 5))):
        base = draw(st.sampled_from(found))[: draw(st.integers(0, 3 * CHUNK))] if found and draw(st.booleans()) else []
        length = draw(st.integers(1, 2 * CHUNK + 3))
        rng = np.random.default_rng(draw(st.integers(0, 3)))
        found.append([*base, *rng.integers(3, 260, length).tolist()])
    return found


@settings(max_examples=25, deadline=None)
@given(calls=st.lists(branching(), min_size=1, max_size=3), threads=st.integers(1, 3), data=st.data())
def test_rows_side_by_side_have_the_bits_of_chunks_that_go_alone(
    small: Path, calls: list[list[list[int]]], threads: int, data: st.DataObject
) -> None:
    model = Llama(read_gguf(small))
    for contexts in calls:
        chunks = [
            Chunk(ids, start)
            for ids in data.draw(st.permutations(contexts))
            for start in range(0, len(ids), CHUNK)
            if data.draw(st.booleans())
        ]
        with threadpoolctl.threadpool_limits(threads):
            found = model.hidden(chunks)
        for chunk, hidden in zip(chunks, found, strict=True):
            slow = Llama(read_gguf(small))
            slow.at_once, slow.period = 1, CHUNK
            (expected,) = slow.hidden([chunk])
            assert np.array_equal(hidden, expected)
            some = range(0, chunk.end - chunk.start, data.draw(st.integers(1, 7)))
            logits, slow_logits = (
                [row.copy() for row in each.logits(hidden[some], [chunk.start + row for row in some])]
                for each in (model, slow)
            )
            assert np.array_equal(logits, slow_logits)


@pytest.mark.parametrize("kind", ["SkylakeX", "Haswell", "Zen", "Nehalem"])
def test_rows_keep_their_bits_with_the_code_of_other_processors(kind: str) -> None:
    # The properties above, and that with none of them each chunk must go alone.
    which = "side_by_side or computed_together or whatever_follows or has_a_period"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", which],
        cwd=ROOT,
        env=os.environ | {"OPENBLAS_CORETYPE": kind},
        capture_output=True,
        text=True,
    )
    if done.returncode == -signal.SIGILL:
        pytest.skip(f"this processor lacks instructions of {kind}")
    assert done.returncode == 0, done.stdout


def test_every_product_of_a_model_has_a_period(small: Path) -> None:
    assert Llama(read_gguf(small)).at_once == AT_ONCE


@pytest.mark.parametrize("n_blocks", range(1, AT_ONCE + 2))
@pytest.mark.parametrize("shape", [(64, 96), (576, 576), (260, 64), (192, 576), (64, 128)], ids=str)
def test_a_row_has_a_period_in_products_of_any_number_of_blocks(shape: tuple[int, int], n_blocks: int) -> None:
    rng = np.random.default_rng(n_blocks)
    weight = rng.standard_normal(shape, dtype=np.float32)
    with threadpoolctl.threadpool_limits(1):
        period = find_period([(weight, AT_ONCE)])
        assert period is not None
        context = rng.standard_normal((3 * CHUNK, shape[1]), dtype=np.float32)
        expected = np.concatenate([context[at : at + CHUNK] @ weight.T for at in range(0, len(context), CHUNK)])
        positions = rng.integers(0, len(context), n_blocks * CHUNK // period).tolist()
        at = places(positions, period)
        found = (spread(context[positions], at) @ weight.T)[at]
    assert np.array_equal(found, expected[positions])


class Odd(np.ndarray):
    """A weight by which every sixth row, and those of large products, are multiplied otherwise."""

    most = 10 * CHUNK

    def __rmatmul__(self, x: np.ndarray) -> np.ndarray:
        product = np.asarray(x) @ np.asarray(self)
        product[::6] *= 2
        return product if len(x) <= self.most else 3 * product


def test_a_period_that_a_product_lacks_is_not_taken() -> None:
    weight = np.ones((8, 8), np.float32)
    assert find_period([(weight, 3)]) == 1
    assert find_period([(weight, 3), (weight.view(Odd), 3)]) == 6
    assert find_period([(weight, 3), (weight.view(Odd), 11)]) is None


@given(
    positions=st.lists(st.integers(0, 200), min_size=1, max_size=40), period=st.sampled_from([1, 2, 6, 12, 16, CHUNK])
)
def test_places_rise_and_are_the_positions_up_to_the_period(positions: list[int], period: int) -> None:
    at = places(positions, period)
    assert [place % period for place in at] == [position % period for position in positions]
    steps = np.diff([-1, *at])
    assert steps.min() >= 1
    assert steps.max() <= period
    rows = np.arange(1, len(at) + 1, dtype=np.float32)[:, None]
    filled = spread(rows, at)
    assert len(filled) % CHUNK == 0
    assert np.array_equal(filled[at], rows)
    assert filled.sum() == rows.sum()


def test_rows_beyond_the_limit_are_let_go_of_and_computed_again(
    small: Path, reference: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    row_bytes = 4 * (tiny.WIDTH + tiny.LAYERS * 2 * tiny.KV_HEADS * tiny.HEAD_DIM)
    monkeypatch.setattr(kept_rows, "_KEPT_BYTES", 4 * CHUNK * row_bytes)
    model = Llama(read_gguf(small))
    others = np.random.default_rng(9).integers(3, 260, (12, CHUNK + 7)).tolist()
    for at, other in enumerate(others):
        all_rows(model, [*IDS[: 10 * at], *other])
        assert len(model._rows._next) <= 4 * CHUNK
        assert len(model._rows._outputs) <= 8 * CHUNK
        assert np.array_equal(all_rows(model, IDS), reference)
    long = [*IDS, *IDS, *IDS]
    whole = all_rows(Llama(read_gguf(small)), long)
    assert np.array_equal(all_rows(model, long), whole)
    assert np.array_equal(all_rows(model, IDS), reference)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_pass_that_fails_leaves_nothing_behind(
    small: Path, reference: np.ndarray, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Llama(read_gguf(small))
    mixed = model._mixed

    def failing(q: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
        if keys.shape[1] > CHUNK:
            raise MemoryError("none left")
        return mixed(q, keys, values)

    with monkeypatch.context() as patched, threadpoolctl.threadpool_limits(threads):
        patched.setattr(model, "_mixed", failing)
        with pytest.raises(MemoryError, match="none left"):
            all_rows(model, IDS)
    assert np.array_equal(all_rows(model, IDS), reference)


def test_a_pass_that_is_given_up_leaves_nothing_behind(small: Path, reference: np.ndarray) -> None:
    model = Llama(read_gguf(small))
    next(model.logprobs([*reversed(IDS)], range(len(IDS)))).clear()
    assert np.array_equal(all_rows(model, IDS), reference)


def test_feeding_token_by_token_agrees_with_one_pass(small: Path, reference: np.ndarray) -> None:
    model = Llama(read_gguf(small))
    cache = Cache(model.config)
    model.feed(cache, IDS[: CHUNK + 3])
    for row in range(CHUNK + 3, len(IDS)):
        stepwise = log_softmax(model.feed(cache, [IDS[row]]))
        assert np.abs(stepwise - reference[row]).max() < 1e-4


def test_weights_that_are_not_finite_raise_instead_of_giving_numbers(tmp_path: Path) -> None:
    weights = tiny.random_weights()
    weights["output_norm.weight"][:] = np.nan
    model = Llama(read_gguf(tiny.write(tmp_path / "m.gguf", weights, tiny.metadata())))
    with pytest.raises(FloatingPointError, match="not finite"):
        all_rows(model, IDS[:3])


# Rounding


def test_rounding_is_to_the_nearest_of_the_groups_own_levels() -> None:
    # Largest magnitude 8 and 4 bits: the scale is 1 or -1, the levels are -8 .. 7 or -7 .. 8.
    values = np.zeros(3 * GROUP, np.float32)
    values[:6] = [-8.0, 8.0, 1.4, -1.6, 0.4, 2.5]
    values[GROUP : GROUP + 5] = [8.0, -7.6, 6.6, -1.6, 2.5]
    round_in_groups(values, 4)
    assert values[:6].tolist() == [-8.0, 7.0, 1.0, -2.0, 0.0, 3.0]
    assert values[GROUP : GROUP + 5].tolist() == [8.0, -7.0, 7.0, -2.0, 2.0]
    assert not values[2 * GROUP :].any()


@pytest.mark.parametrize("bits", [4, 3])
def test_rounding_uses_every_level_and_is_off_by_half_a_step_unless_cut(bits: int) -> None:
    exact = np.random.default_rng(1).standard_normal((5000, GROUP)).astype(np.float32)
    rounded = exact.copy()
    round_in_groups(rounded.reshape(-1), bits)
    largest = np.take_along_axis(exact, np.abs(exact).argmax(axis=1)[:, None], axis=1)
    steps, given = (values / (largest / -(2 ** (bits - 1))) for values in (rounded, exact))
    assert np.abs(steps - np.rint(steps)).max() < 1e-4
    assert np.unique(np.rint(steps)).tolist() == list(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
    assert (np.abs(steps - np.minimum(given, 2 ** (bits - 1) - 1)) <= 0.5001).all()
    assert (given > 2 ** (bits - 1) - 0.5).any(), "some are cut"


@pytest.mark.parametrize(("bits", "kind"), [(8, gguf.GGMLQuantizationType.Q8_0), (4, gguf.GGMLQuantizationType.Q4_0)])
def test_rounded_weights_are_those_of_a_file_of_that_type(bits: int, kind: gguf.GGMLQuantizationType) -> None:
    exact = np.random.default_rng(2).standard_normal((9000, GROUP)).astype(np.float32)
    exact[7] = 0
    stored = gguf.quants.dequantize(gguf.quants.quantize(exact, kind), kind)
    rounded = exact.copy()
    round_in_groups(rounded.reshape(-1), bits)
    # The same levels; the file's scales are float16, which are off by up to 2**-11 of them.
    assert (np.abs(rounded - stored) <= np.abs(rounded) * 2.0**-10).all()


def test_norms_and_biases_are_not_rounded(tmp_path: Path) -> None:
    weights = tiny.random_weights(bias=True, tied=False)
    model = Llama(read_gguf(tiny.write(tmp_path / "m.gguf", weights, tiny.metadata())), bits=3)
    layer = model.layers[1]
    assert np.array_equal(model.output_norm, weights["output_norm.weight"])
    assert np.array_equal(layer.ffn_norm, weights["blk.1.ffn_norm.weight"])
    assert layer.q.bias is not None
    assert np.array_equal(layer.q.bias, weights["blk.1.attn_q.bias"])
    for rounded, name in (
        (layer.down.weight, "blk.1.ffn_down.weight"),
        (model.output, "output.weight"),
        (model.embedding, "token_embd.weight"),
    ):
        expected = weights[name].reshape(-1).copy()
        round_in_groups(expected, 3)
        assert np.array_equal(rounded.reshape(-1), expected)
        assert not np.array_equal(rounded, weights[name])


# The reader


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1", "Q5_0"])
def test_tensors_are_dequantised_as_by_gguf(tmp_path: Path, kind: str) -> None:
    exact = (
        np.random.default_rng(2).standard_normal((4100, 96)).astype(np.float32)
    )  # more than one piece, odd remainder
    stored = gguf.quants.quantize(exact, gguf.GGMLQuantizationType[kind])
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("before", np.zeros(3, np.float32))
    writer.add_tensor("x", stored, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(tmp_path / "m.gguf")
    file.check_tensors(None)
    expected = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[kind]).reshape(exact.shape)
    assert file.load("x").dtype == np.float32
    assert np.array_equal(file.load("x"), expected)


def test_the_header_agrees_with_ggufs_own_reader(small: Path) -> None:
    file, theirs = read_gguf(small), gguf.GGUFReader(small)
    expected = {key: entry.contents() for key, entry in theirs.fields.items() if not key.startswith("GGUF.")}
    assert file.metadata == expected
    assert {info.name: (info.size, info.offset) for info in file.tensors.values()} == {
        tensor.name: (tensor.n_elements, tensor.data_offset) for tensor in theirs.tensors
    }


@dataclass(frozen=True)
class Refused:
    id: str
    message: str
    values: dict[str, Any] = field(default_factory=dict)
    change: Callable[[dict[str, np.ndarray]], Any] = lambda weights: None
    architecture: str = "llama"
    bits: int | None = None


REFUSED = [
    Refused("another architecture", r"architecture 'qwen2' is not supported, 'llama' is", architecture="qwen2"),
    Refused("a mixture of experts", r"mixture of experts", {"llama__expert_count": 8}),
    Refused("yarn", r"scaling.type 'yarn' is not supported", {"llama__rope__scaling__type": "yarn"}),
    Refused("heads that differ by layer", r"head_count_kv differs", {"llama__attention__head_count_kv": [2, 4]}),
    Refused("value heads of another size", r"value_length is not", {"llama__attention__value_length": 16}),
    Refused("metadata missing", r"'llama.context_length' is missing", {"llama__context_length": None}),
    Refused("sizes that do not divide", r"do not fit", {"llama__attention__head_count_kv": 3}),
    Refused("a tensor missing", r"'blk.1.ffn_up.weight' is missing", change=lambda w: w.pop("blk.1.ffn_up.weight")),
    Refused("a tensor that would be ignored", r"1 tensors are not part .* 'blk.0.attn_q_norm.weight'",
            change=lambda w: w.update({"blk.0.attn_q_norm.weight": np.ones(32, np.float32)})),
    Refused("a tensor of another shape", r"'output_norm.weight' has shape \(63,\), the metadata say \(64,\)",
            change=lambda w: w.update({"output_norm.weight": np.ones(63, np.float32)})),
    Refused("a tensor type without weights", r"'output_norm.weight' has a type that cannot be read",
            change=lambda w: w.update({"output_norm.weight": np.ones(64, np.int32)})),
    Refused("rows that groups do not divide", r"rows of 48, which groups of 32 do not divide; use .* without @int4",
            change=lambda w: w.update({"extra.weight": np.ones((2, 48), np.float32)}), bits=4),
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.id)
def test_a_file_that_would_give_wrong_numbers_is_refused_in_one_line(tmp_path: Path, case: Refused) -> None:
    weights = tiny.random_weights()
    case.change(weights)
    path = tiny.write(tmp_path / "m.gguf", weights, tiny.metadata(**case.values), case.architecture)
    with pytest.raises(ModelNotUsableError, match=case.message) as caught:
        _open(path, case.bits)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def _open(path: Path, bits: int | None) -> None:
    file = read_gguf(path)
    file.check_tensors(bits)
    check_shapes(file, LlamaConfig.from_gguf(file))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"PK\x03\x04" + data[4:], r"not a GGUF file \(it begins with b'PK"),
        (lambda data: b"", r"not a GGUF file \(it begins with b''"),
        (lambda data: data[:4] + struct.pack("<I", 1) + data[8:], r"version 1 .* not supported"),
        (lambda data: data[:200], r"header is damaged .*fetch the file again"),
        (lambda data: data[:16] + struct.pack("<Q", 2**60) + data[24:], r"header is damaged"),
        (lambda data: data[:-5000], r"is cut; fetch it again"),
    ],
    ids=["zip file", "empty file", "version 1", "cut in the header", "absurd count", "cut in the weights"],
)
def test_a_damaged_file_is_named_as_such(
    small: Path, tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damage(small.read_bytes()))
    with pytest.raises(ModelNotUsableError, match=message):
        _open(path, None)


def test_the_content_hash_follows_the_content_and_not_the_name(small: Path, tmp_path: Path) -> None:
    copy = tmp_path / "other name.gguf"
    copy.write_bytes(small.read_bytes())
    assert content_hash(copy) == content_hash(small)
    copy.write_bytes(small.read_bytes()[:-1] + b"!")
    os.utime(copy, ns=(1, 1))  # a change within the clock's step is seen by size or by time, here by time
    assert content_hash(copy) != content_hash(small)
