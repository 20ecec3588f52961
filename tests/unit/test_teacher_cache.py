"""The teacher cache: how near its divergence is, how small it is, and that a stale entry is never used."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from unit import vla_fakes as fakes

from dualvla.distill import cache, topk
from dualvla.distill.cache import CacheSettings, TeacherCache, collate
from dualvla.distill.facts import TeacherFacts, check_teacher
from dualvla.distill.losses import token_kd
from dualvla.distill.step import training_loss
from dualvla.distill.teachers import Teachers
from dualvla.distill.topk import Known
from dualvla.errors import CheckpointError, DataError, UsageError
from dualvla.io import manifest
from dualvla.models import backbone as backbones
from dualvla.models.config import HeadConfig, LossWeights, ModelConfig
from dualvla.models.processing import Processor, Sample
from dualvla.models.stages import prepare
from dualvla.models.vla import VLA

REAL_VOCABULARY = 152_000
KINDS = ("forward", "reverse", "mixed", "jensen-shannon")


STEEP, FLAT, VERY_FLAT = 3.0, 2.0, 1.5  # softened, the r-th word has about r^-this; a language model's is above 2


def _speaker(tokens: int, vocab_size: int, temperature: float, slope: float = STEEP, seed: int = 0) -> torch.Tensor:
    """Logits [1, tokens, V] with a long tail."""
    generator = torch.Generator().manual_seed(seed)
    rank = torch.arange(1, vocab_size + 1).float()
    rows = []
    for _ in range(tokens):
        heights = -slope * temperature * torch.log(rank + 3 * torch.rand(1, generator=generator))
        rows.append(heights[torch.randperm(vocab_size, generator=generator)])
    return (torch.stack(rows) + 0.3 * torch.randn(tokens, vocab_size, generator=generator)).unsqueeze(0)


def _places(tokens: int, draws: int, seed: int = 0) -> torch.Tensor:
    starts = torch.rand(tokens, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (starts + torch.arange(draws)) / max(1, draws)


def _cached(logits: torch.Tensor, k: int, draws: int, temperature: float, packed: bool) -> Known:
    """What a cache gives back of logits [1, T, V]."""
    vocab_size = logits.shape[-1]
    known = topk.know(logits[0], k - draws, temperature, _places(logits.shape[1], draws))
    read = topk.decode(topk.encode(known, vocab_size, packed), k, draws, vocab_size, packed)
    assert torch.equal(read.ids, known.ids)
    assert torch.equal(read.drawn, known.drawn)
    return _batch(read)


def _batch(known: Known) -> Known:
    return Known(*(tensor.unsqueeze(0) for tensor in known.targets().values()))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("slope", [STEEP, FLAT, VERY_FLAT])
def test_the_divergence_from_50_tokens_is_within_one_percent(slope: float, temperature: float, packed: bool) -> None:
    """Of however flat a teacher: a third of the mass of the flattest here lies outside its likeliest words."""
    teacher = _speaker(400, 4_000, temperature, slope)
    known = _cached(teacher, 50, 8, temperature, packed)
    assert (known.p[..., -1].mean() > 0.15) == (slope == VERY_FLAT)
    mask = torch.ones(1, 400, dtype=torch.bool)
    for noise in (0.0, 0.1, 0.5, 1.0, 2.0):
        student = teacher + noise * torch.randn(teacher.shape, generator=torch.Generator().manual_seed(1))
        exact = token_kd(student, teacher, mask, temperature).item() / temperature**2
        near = topk.known_kd(student, known, mask, temperature).item() / temperature**2
        assert abs(near - exact) <= 0.01 * max(exact, 0.1), noise


@pytest.mark.parametrize("kind", KINDS)
def test_draws_from_the_tail_estimate_every_divergence_without_bias(kind: str) -> None:
    """Over evenly spread draws the mean is the divergence over all words; without draws a part of it is missing."""
    teacher = _speaker(1, 300, 1.0, VERY_FLAT)
    student = teacher + torch.randn(teacher.shape, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(1, 1, dtype=torch.bool)
    exact = token_kd(student, teacher, mask, 1.0, kind=kind, mix=0.3).item()
    places = (torch.arange(20_000, dtype=torch.float64).unsqueeze(0) + 0.5) / 20_000
    many, none = (_batch(topk.know(teacher[0], 10, 1.0, p)) for p in (places, places[:, :0]))
    near, without = (topk.known_kd(student, known, mask, 1.0, kind=kind, mix=0.3).item() for known in (many, none))
    assert near == pytest.approx(exact, rel=2e-3)
    assert without < 0.9 * exact


@pytest.mark.parametrize(("packed", "limit"), [(False, 160), (True, 120)])
def test_a_token_takes_few_bytes_at_a_real_vocabulary(packed: bool, limit: int, tmp_path: Path) -> None:
    """The distributions of 30 tokens over ever other words, so that a file gains nothing from repetition."""
    known = topk.know(_speaker(30, REAL_VOCABULARY, 2.0)[0], 42, 2.0, _places(30, 8))
    rng = np.random.default_rng(0)
    parts = []
    for i in range(30):
        words = torch.from_numpy(rng.permutation(REAL_VOCABULARY))
        (ids, order), (drawn, drawn_order) = words[known.ids].sort(), words[known.drawn].sort()
        p = torch.cat([known.p.gather(-1, order), known.p[:, -1:]], dim=-1)
        other = Known(ids, p, drawn, known.log_p.gather(-1, drawn_order))
        fields = topk.encode(other, REAL_VOCABULARY, packed)
        assert torch.equal(topk.decode(fields, 50, 8, REAL_VOCABULARY, packed).ids, ids)
        assert sum(map(len, fields.values())) == 30 * topk.bytes_per_token(50, 8, REAL_VOCABULARY, packed)
        parts.append(cache.Entries(np.array([i]), np.array([0]), np.array([0]), {n: [v] for n, v in fields.items()}))
    url = tmp_path / "part.parquet"
    cache.write_part(str(url), parts)
    assert url.stat().st_size / 900 <= limit
    assert packed or topk.bytes_per_token(50, 8, REAL_VOCABULARY, packed) <= limit


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000), k=st.integers(1, 60), draws=st.integers(0, 9), extra=st.integers(1, 200_000),
    packed=st.booleans(),
)  # fmt: skip
def test_any_ids_survive_both_forms(seed: int, k: int, draws: int, extra: int, packed: bool) -> None:
    rng = np.random.default_rng(seed)
    vocab_size = k + extra
    ids = np.sort(np.stack([rng.choice(vocab_size, k, replace=False) for _ in range(3)]), axis=1)
    drawn = np.sort(rng.integers(0, vocab_size, (3, draws)), axis=1)  # one may come twice
    p, log_p = rng.dirichlet(np.ones(k + 1), 3), -rng.exponential(3.0, (3, draws))
    known = Known(*(torch.from_numpy(a) for a in (ids, p.astype(np.float32), drawn, log_p.astype(np.float32))))
    read = topk.decode(topk.encode(known, vocab_size, packed), k + draws, draws, vocab_size, packed)
    assert torch.equal(read.ids, known.ids)
    assert torch.equal(read.drawn, known.drawn)
    torch.testing.assert_close(read.p.sum(dim=1), torch.ones(3), atol=1e-5, rtol=0.0)
    torch.testing.assert_close(read.p, known.p, atol=0.03, rtol=0.0)
    torch.testing.assert_close(read.log_p, known.log_p, atol=0.0626, rtol=0.0)


def test_a_teacher_that_the_student_equals_teaches_nothing_and_masked_tokens_never_do() -> None:
    teacher = _speaker(6, 300, 2.0)
    whole = _batch(topk.know(teacher[0], 20, 2.0, _places(6, 8)))
    mask = torch.tensor([[True, True, False, True, False, False]])
    assert topk.known_kd(teacher + 3.0, whole, mask, 2.0).item() == pytest.approx(0.0, abs=1e-5)
    student = (teacher + torch.randn(teacher.shape)).requires_grad_(True)
    loss = topk.known_kd(student, whole, mask, 2.0)
    loss.backward()
    assert student.grad is not None
    assert (student.grad[0, ~mask[0]] == 0).all()
    assert student.grad[0, mask[0]].isfinite().all()
    for other in (_batch(topk.know(-teacher[0], 20, 2.0, _places(6, 8, seed=1))), topk.unknown((1, 6), 20, 8)):
        pairs = zip(other.targets().values(), whole.targets().values(), strict=True)
        disturbed = Known(*(torch.where(mask.unsqueeze(-1), right, wrong) for wrong, right in pairs))
        assert topk.known_kd(student, disturbed, mask, 2.0) == loss
        student.grad = None
        topk.known_kd(student, disturbed, mask, 2.0).backward()
        assert student.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_cached_divergence_match_finite_differences(kind: str) -> None:
    teacher = torch.randn(3, 12, dtype=torch.float64)
    known = topk.know(teacher, 4, 2.0, _places(3, 2))
    whole = _batch(Known(known.ids, known.p.double(), known.drawn, known.log_p.double()))
    mask = torch.tensor([[True, False, True]])
    student = torch.randn(1, 3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda s: topk.known_kd(s, whole, mask, 2.0, kind=kind, mix=0.3),
        (student,),  # type: ignore[arg-type]
    )


# A whole cache, of small random teachers.


@dataclasses.dataclass
class School:
    """A student, its teachers, samples of both domains, and where their cache lies."""

    student: VLA
    action: VLA
    reasoning: VLA
    processor: Processor
    samples: list[Sample]
    settings: CacheSettings
    folder: str

    def facts(self) -> dict[cache.Domain, TeacherFacts]:
        config = self.student.config
        return {d: TeacherFacts.of(config, self.processor, f"digest of {d}", d) for d in ("robot", "multimodal")}


def _shaken(config: ModelConfig, processor: Processor, seed: int) -> VLA:
    model = VLA.create(config, processor, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif "embed_tokens" in name:
                parameter.mul_(60.0)  # sure of its words
    return model


@pytest.fixture(scope="module", params=["flow", "token, packed"])
def school(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> School:
    kind = request.param.split(",")[0]
    config = prepare(fakes.config(head=HeadConfig(kind=kind, hidden=32, layers=2, heads=2, draws=3)), "dual")
    processor = fakes.processor(config)
    student, action, reasoning = (_shaken(config, processor, seed) for seed in range(3))
    wanted = CacheSettings(temperature=1.0, views=2, packed="packed" in request.param)
    made = School(
        student, action, reasoning, processor, fakes.mixed(), wanted, str(tmp_path_factory.mktemp("school") / "cache")
    )
    _fill(made)
    return made


def _fill(school: School) -> None:
    config = cache.settings_of(school.settings, school.facts())
    manifest.begin(school.folder, cache.KIND, config, {})
    groups: dict[cache.Domain, list[Sample]] = {"robot": school.samples[:3], "multimodal": school.samples[3:]}
    files = {}
    for domain, samples in groups.items():
        parts = []
        for view in range(school.settings.views):
            batch = collate(school.processor, samples, [view] * len(samples), school.settings)
            with torch.no_grad():
                if domain == "robot":
                    (predicted,) = school.action(batch, mode="action").values()
                    parts.append(cache.action_entries(batch, predicted))
                else:
                    logits = school.reasoning(batch, mode="logits")["logits"]
                    parts.append(cache.reasoning_entries(batch, logits, school.settings))
        url = cache.part_url(school.folder, domain, 0)
        cache.write_part(url, parts)
        files[f"{cache.PARTS[domain]}/{Path(url).name}"] = manifest.file_digest(url)
    manifest.finish(school.folder, cache.KIND, config, {}, files=files)


def test_cached_and_online_teachers_give_the_same_loss(school: School) -> None:
    cached = TeacherCache(school.folder)
    cached.check(school.facts(), temperature=1.0)
    online = Teachers.in_process(school.action, school.reasoning)
    weights = LossWeights(temperature=1.0)
    for step in range(3):
        batch = cached.collate(school.processor, school.samples, seed=5, step=step)
        theirs = training_loss(school.student, batch, weights, teachers=online)
        ours = training_loss(school.student, batch, weights, teachers=cached)
        assert ours.keys() == theirs.keys()
        for name in theirs:
            top_k_error = 0.01 * max(theirs["kd_token"].item(), 0.1)
            allowed = {"kd_token": top_k_error, "loss": weights.kd * top_k_error}.get(name, 0.0)
            torch.testing.assert_close(ours[name], theirs[name], atol=allowed + 1e-3, rtol=1e-3)


def test_views_differ_and_are_drawn_by_seed_sample_and_step(school: School) -> None:
    cached = TeacherCache(school.folder)
    batches = [cached.collate(school.processor, school.samples, seed=0, step=s) for s in range(12)]
    drawn = torch.stack([b["view"] for b in batches])
    assert (drawn.float().std(dim=0) > 0).all()
    again = cached.collate(school.processor, school.samples[::-1], seed=0, step=3)
    assert torch.equal(again["view"].flip(0), batches[3]["view"])
    alone = collate(school.processor, school.samples[:1], [0], school.settings)
    other = collate(school.processor, school.samples[:1], [1], school.settings)
    assert not torch.equal(alone["noise"], other["noise"])


def test_what_was_cached_from_anything_else_is_refused_by_name(school: School) -> None:
    cached = TeacherCache(school.folder)
    facts = school.facts()
    config = school.student.config
    stale = {
        "another teacher checkpoint": dataclasses.replace(facts["robot"], checkpoint="other"),
        "action normalisation": dataclasses.replace(
            facts["robot"], processor={**facts["robot"].processor, "action normalisation": "other"}
        ),
        "color_jitter": TeacherFacts.of(
            dataclasses.replace(config, color_jitter=0.3), school.processor, facts["robot"].checkpoint, "robot"
        ),
    }
    for reason, changed in stale.items():
        with pytest.raises(DataError, match=reason):
            cached.check({**facts, "robot": changed}, temperature=1.0)
    with pytest.raises(DataError, match=r"softened by temperature 1\.0, training wants 2\.0"):
        cached.check(facts, temperature=2.0)

    changed_image = {"main": 255 - school.samples[0].images["main"]}
    for sample in (
        dataclasses.replace(school.samples[0], images=changed_image),
        dataclasses.replace(school.samples[0], actions=school.samples[0].actions + 1),
        dataclasses.replace(school.samples[3], reasoning="three"),
    ):
        with pytest.raises(DataError, match="another than the teacher saw"):
            cached.targets(collate(school.processor, [sample], [0], school.settings))
    with pytest.raises(DataError, match="lacks sample 77"):
        cached.targets(
            collate(school.processor, [dataclasses.replace(school.samples[0], key=77)], [0], school.settings)
        )


def test_pruning_a_text_leaves_the_entry_good(school: School) -> None:
    """One cache serves every pruning ablation: the action teacher never sees the text."""
    cached = TeacherCache(school.folder)
    pruned = dataclasses.replace(school.samples[0], reasoning=None)
    name = cached.facts["robot"].target
    whole, without = (
        cached.targets(collate(school.processor, [s], [1], school.settings))[name] for s in (school.samples[0], pruned)
    )
    assert torch.equal(whole, without)
    assert whole.any()


def test_a_damaged_or_partial_cache_is_refused(school: School, tmp_path: Path) -> None:
    school = dataclasses.replace(school, folder=str(shutil.copytree(school.folder, tmp_path / "copy")))
    only = TeacherCache(school.folder, ("robot",))
    assert set(only.targets(collate(school.processor, school.samples, [0] * 5, school.settings))) == {
        only.facts["robot"].target
    }
    url = Path(cache.part_url(school.folder, "robot", 0))
    table = pq.read_table(url)
    pq.write_table(table.slice(1), url)
    with pytest.raises(DataError, match="not what its manifest says"):
        TeacherCache(school.folder).targets(collate(school.processor, school.samples, [0] * 5, school.settings))
    (Path(school.folder) / "manifest.json").unlink()
    with pytest.raises(DataError, match="not a finished teacher-cache"):
        TeacherCache(school.folder)


def test_a_teacher_with_another_tokenizer_is_refused_with_the_reason() -> None:
    config = fakes.config()
    config = dataclasses.replace(config, backbone_config=backbones.resolve(config, 300))
    student = fakes.processor(config)
    other = Processor.fit(config, ["quite other words"] * 9, np.zeros((2, 7)), np.zeros((2, 3)), np.zeros((2, 3)))
    with pytest.raises(CheckpointError, match=r"'/teacher' cannot be a teacher here: its tokenizer .*\d+ words"):
        check_teacher(config, other, student, "/teacher")
    check_teacher(config, student, student, "/teacher")
    longer = dataclasses.replace(config, horizon=8)
    with pytest.raises(CheckpointError, match="horizon"):
        check_teacher(longer, student, student, "/teacher")


def test_settings_out_of_range_are_refused() -> None:
    for wrong in ({"top_k": 0}, {"top_k": 300}, {"views": 0}, {"tail_draws": 50}, {"tail_draws": -1}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            CacheSettings(**wrong)
