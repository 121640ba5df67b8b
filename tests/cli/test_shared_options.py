"""Options of adapt and decompose are the fields of what Python takes, said once."""

import dataclasses

import pytest

import uoe_jax as uoe
from uoe_jax.adapt.config import AdapterConfig
from uoe_jax.adapt.request import Adaptation
from uoe_jax.cli import main
from uoe_jax.cli.adapt import AdaptOptions
from uoe_jax.cli.decompose import DecomposeOptions
from uoe_jax.cli.fields import option_fields, part_of
from uoe_jax.cli.help import field_texts, list_options
from uoe_jax.cli.parse import parse
from uoe_jax.decompose.cut import Cut
from uoe_jax.errors import ConfigError

PARTS = [(AdaptOptions, AdapterConfig), (AdaptOptions, Adaptation),
         (DecomposeOptions, Cut)]  # fmt: skip
RENAMED = {"use_dora": "--dora", "use_rslora": "--rslora", "which": "--checkpoint",
           "num_experts": "--experts"}  # fmt: skip


@pytest.mark.parametrize(("options", "part"), PARTS)
def test_each_field_is_an_option_with_its_text_and_default(options, part):
    fields = {f.path[0]: f for f in option_fields(options)}
    shown = {o.name.replace("[no-]", ""): o for o in list_options(options)}
    texts = field_texts(part)
    known = [f.name for f in dataclasses.fields(part)]
    assert set(known) - set(fields) <= {"kernel_rank"}  # no run has a convolution
    for name in known:
        if name in ("kernel_rank", "layout", "num_experts"):
            continue
        option = RENAMED.get(name, f"--{name.replace('_', '-')}")
        assert fields[name].option == option
        assert shown[option].text == texts[name] and len(texts[name]) > 3


def test_what_is_typed_is_what_python_gives():
    words = [
        "run",
        "--dora",
        "--rank-pattern",
        "*.wq=16",
        "*.wo=0",
        "--targets",
        "*.wq",
    ]
    typed = parse(AdaptOptions, words, "adapt")
    want = AdapterConfig(
        use_dora=True, rank_pattern={"*.wq": 16, "*.wo": 0}, targets=("*.wq",)
    )
    assert part_of(typed, AdapterConfig) == want
    assert part_of(parse(AdaptOptions, ["run"], "adapt"), AdapterConfig) == (
        AdapterConfig()
    )
    cut = ["run", "--experts", "4", "--parts", "mlp", "--router", "least-squares"]
    typed = parse(DecomposeOptions, [*cut, "--calibrate", "300"], "decompose")
    want = Cut(num_experts=4, parts=("mlp",), router="least_squares", calibrate=300)
    assert part_of(typed, Cut) == want
    typed = parse(DecomposeOptions, [*cut, "--calibrate", "words.txt"], "decompose")
    assert part_of(typed, Cut).calibrate.name == "words.txt"
    plain = parse(DecomposeOptions, ["run", "--experts", "4"], "decompose")
    assert part_of(plain, Cut) == Cut(num_experts=4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["adapt", "r", "--rank", "0"], "--rank is 0; it must be at least 1"),
        (["adapt", "r", "--alpha", "0"], "--alpha is 0.0; it must be positive"),
        (["adapt", "r", "--dropout", "1"], "--dropout is 1.0; it must be in [0, 1)"),
        (["adapt", "r", "--rank-pattern", "*.wq=x"], "'*.wq=x'; write PATTERN=RANK"),
        (["adapt", "r", "--rank-pattern", "a=9999999999"], "--rank-pattern['a'] is"),
        (["adapt", "r", "--kernel-rank", "2"], "no option --kernel-rank"),
        (["decompose", "r", "--experts", "2", "--top-k", "3"], "--top-k is 3; it"),
        (["decompose", "r", "--experts", "2", "--top-k", "0"], "--top-k is 0; it"),
        (["decompose", "r", "--experts", "-2"], "--experts is -2; it must be at"),
        (["decompose", "r", "--experts", "2", "--parts", "all"], "choose from 'both'"),
        (["decompose", "r", "--experts", "2", "--router", "one"], "'least-squares'"),
        (["decompose", "r", "--merge", "--seed", "0"], "leave out --seed"),
        (["decompose", "r", "--merge", "--grouping=random", "--no-refit"],
         "leave out --grouping, --refit"),
    ],
)  # fmt: skip
def test_mistakes_name_the_option_in_one_line(words, said, capsys):
    assert main(words) == 2
    line = capsys.readouterr().err
    assert said in line and line.count("\n") == 1


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: uoe.decompose("r"), "Cut needs num_experts"),
        (lambda: uoe.decompose("r", cut=Cut(num_experts=2), top_k=1), "give either"),
        (lambda: uoe.decompose("r", cut=4), "cut is 4; expected Cut"),
        (lambda: uoe.decompose("r", num_experts=2, topk=1), "did you mean top_k"),
    ],
)
def test_python_takes_the_config_or_its_fields(call, said):
    with pytest.raises(ConfigError, match=said):
        call()


def test_an_adapter_is_a_config_or_its_fields(union_run, tmp_path):
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    rest = {"steps": 1, "batch_size": 8, "eval_batches": 1, "quiet": True}
    uoe.adapt(union_run, one, adapter=AdapterConfig(rank=3), **rest)
    uoe.adapt(union_run, two, rank=3, **rest)
    file = "adapter_model.safetensors"
    assert (one / file).read_bytes() == (two / file).read_bytes()
    report = uoe.adapt(union_run, three, load=one, **rest | {"steps": 0})
    assert report["rank"] == 3
    for options, said in (
        ({"adapter": AdapterConfig(), "rank": 3}, "rank with adapter; they are"),
        ({"load": "somewhere", "rank": 3}, "rank with load; a loaded adapter keeps"),
        ({"rnak": 3}, "did you mean rank"),
        ({"rank": "3"}, "rank is '3'; expected int"),
        ({"batchsize": 3}, "did you mean batch_size"),
    ):
        with pytest.raises(ConfigError, match=said):
            uoe.adapt(union_run, **options)
