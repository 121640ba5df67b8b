"""What an installation without extras can do, and what it says of the rest."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from uoe_jax.errors import EXTRAS, MissingExtra, extra_packages

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Rivals that `uoe bench` times where they are installed, and what accelerators bring.
FOUND_OR_NOT = {"cuda_bench", "tokamax", "torch", "triton", "libtpu", "jax_triton"}
FOUND_OR_NOT |= {"jax_linear_attention", "nvidia"}
# Comes with jax, flax or orbax, or is asked for by what is registered.
# Of jax, orbax and ourselves.
COMES_ALONG = {"jaxlib", "ml_dtypes", "scipy", "etils", "uoe_jax", "tensorstore"}


def name_of(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


INSTALLED = packages_distributions()


def distributions(package: str) -> set[str]:
    found = INSTALLED.get(package, [package])
    return {name.lower().replace("_", "-") for name in found}


BASE = {name_of(line) for line in PROJECT["dependencies"]}
OF_EXTRA = {
    extra: {name_of(line) for line in lines}
    for extra, lines in PROJECT["optional-dependencies"].items()
}


GUARDS = ("with extra_packages()", "if TYPE_CHECKING")


def outside_imports():
    """Every import of another package: file, package, and whether it is guarded."""
    for path in sorted((ROOT / "uoe_jax").rglob("*.py")):
        tree = ast.parse(path.read_text())
        guarded = {
            id(inside)
            for node in ast.walk(tree)
            if isinstance(node, ast.With | ast.If)
            and ast.unparse(node).startswith(GUARDS)
            for inside in ast.walk(node)
        }
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in {name.split(".")[0] for name in names}:
                if name not in sys.stdlib_module_names:
                    yield path.relative_to(ROOT), name, id(node) in guarded


def test_every_package_is_of_the_base_or_named_with_its_extra():
    offenders, found = [], list(outside_imports())
    # One guarded import of a package in a file says what is missing.
    said = {(path, package) for path, package, guarded in found if guarded}
    for path, package, _ in found:
        if package in COMES_ALONG | FOUND_OR_NOT or distributions(package) & BASE:
            continue
        if package not in EXTRAS:
            offenders.append(f"{path}: {package} is neither in the base nor in EXTRAS")
        elif (path, package) not in said:
            offenders.append(f"{path}: {package} without extra_packages()")
    assert not offenders, "\n".join(offenders)


def test_an_extra_brings_the_package_that_it_is_named_for():
    for package, extra in EXTRAS.items():
        # scipy comes with scikit-learn.
        wanted = distributions("sklearn" if package == "scipy" else package)
        wanted |= {"pillow"} if package == "PIL" else set()
        assert wanted & OF_EXTRA[extra], package
    assert not BASE & set().union(*(OF_EXTRA[e] for e in set(EXTRAS.values())))


def test_only_known_packages_are_taken_for_an_extra():
    with pytest.raises(MissingExtra, match=r"wandb.*pip install 'uoe_jax\[wandb\]'"):
        with extra_packages():
            raise ModuleNotFoundError("No module named 'wandb.sdk'", name="wandb.sdk")
    with pytest.raises(ModuleNotFoundError, match="sandwich"), extra_packages():
        raise ModuleNotFoundError("No module named 'sandwich'", name="sandwich")


# The packages of all extras, as if nobody had installed them.
WITHOUT = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {sorted(EXTRAS)}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""


def run_without(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + code], capture_output=True, text=True, cwd=cwd
    )


def test_operations_need_jax_jaxtyping_and_numpy_alone(tmp_path):
    code = """
import jax, jax.numpy as jnp
from uoe_jax import ops
x = jax.random.normal(jax.random.key(0), (6, 8))
out = ops.grouped_matmul(x, jnp.ones((2, 8, 3)), jnp.array([0, 4, 6]))
assert jnp.allclose(out, jnp.repeat(x.sum(1)[:, None], 3, 1), atol=1e-5)
loaded = {name.split(".")[0] for name in sys.modules}
print(sorted(loaded & {"flax", "optax", "orbax", "tyro", "rich", "safetensors"}))
"""
    done = run_without(code, tmp_path)
    assert done.stdout.strip() == "[]", done.stderr


def test_what_the_base_cannot_do_names_the_extra_before_anything_begins(tmp_path):
    (tmp_path / "ratings.csv").write_text("user,item,rating\n1,1,3\n1,2,4\n2,1,5\n")
    bpe = "data tiny --data.tokenizer bpe --data.cache-dir . "
    bpe += "--data.bpe-vocab-size 512 --model.vocab-size 512"
    wanted = {
        "demo": "report",
        "complete ratings.csv": "data",
        "bench union": "report",
        "train digits-vit --data.cache-dir .": "data",
        bpe: "data",
    }
    code = f"""
from uoe_jax.cli import main
for words in {list(wanted)!r}:
    print("exit code", main(words.split()))
"""
    done = run_without(code, tmp_path)
    codes = re.findall(r"^exit code (\d)$", done.stdout, re.M)
    assert codes == ["2"] * len(wanted), done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("uoe: ")]
    extras = [re.search(r"pip install 'uoe_jax\[(\w+)\]'", line)[1] for line in said]
    assert extras == list(wanted.values()), done.stderr
    assert not list(tmp_path.glob("runs/*/metrics.jsonl"))


@pytest.mark.nightly
def test_the_base_trains_and_only_the_report_is_missing(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n\n\n" * 500)
    words = (
        "train tiny-union --run-dir run --train.steps 2 --model.d-model 16 "
        "--model.d-ff 32 --model.num-layers 1 --model.head-dim 4 --quiet "
        "--model.max-seq-len 32 --data.path text.txt --data.cache-dir cache "
        "--data.batch-size 8 --train.eval-batches 1"
    )
    code = f"from uoe_jax.cli import main\nprint('exit code', main({words.split()!r}))"
    done = run_without(code, tmp_path)
    assert "exit code 0" in done.stdout, done.stderr
    assert "no report: this needs matplotlib, which isn't installed" in done.stderr
    assert "pip install 'uoe_jax[report]'" in done.stderr
    assert (tmp_path / "run" / "metrics.jsonl").is_file()


def test_attention_of_others_is_in_one_extra_and_a_backend_each():
    from uoe_jax.ops.dense_attention import api, peers

    modules = {"linear_attention": "jax-linear-attention", "tokamax": "tokamax"}
    functions = (peers.tokamax, peers.linear_attention)
    theirs = {name for name, run in api.BACKENDS.items() if run in functions}
    assert theirs == set(modules) and OF_EXTRA["peers"] == set(modules.values())
    # They come last: only a measurement chooses them.
    assert set([*api.BACKENDS][-len(theirs) :]) == theirs
