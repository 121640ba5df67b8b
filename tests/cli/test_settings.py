"""What suits every verb: which devices, and whether compiled programs are kept."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from uoe_jax.cli import main
from uoe_jax.config import MeshConfig
from uoe_jax.errors import ConfigError
from uoe_jax.partition.mesh import make_mesh

ROOT = Path(__file__).parents[2]
PREPARED = """
import os, sys
from uoe_jax.cli.device import prepare, settings
with settings(sys.argv[1:]) as rest:
    prepare()
    import jax
    kept = jax.config.jax_enable_compilation_cache
    print(jax.device_count(), kept and jax.config.jax_compilation_cache_dir, *rest)
print("JAX_NUM_CPU_DEVICES" in os.environ)
"""


def prepared(tmp_path, *args, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    clean |= {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", PREPARED, *args],
        env=clean | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_a_cpu_can_be_several_devices(tmp_path):
    found = prepared(tmp_path, "train", "--devices", "cpu:3", "--seed", "1")
    assert (found[0], *found[2:]) == ("3", "train", "--seed", "1", "False")
    assert prepared(tmp_path, "--devices=cpu")[0] == "1"


def test_programs_are_kept_in_the_users_cache_unless_told_otherwise(tmp_path):
    kept = prepared(tmp_path)[1]
    assert Path(kept).is_relative_to(tmp_path / "uoe_jax" / "programs")
    assert prepared(tmp_path, "--no-compile-cache")[1] == "False"
    elsewhere = prepared(tmp_path, JAX_COMPILATION_CACHE_DIR="/elsewhere")
    assert elsewhere[1] == "/elsewhere"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "--devices is ''; write cpu, gpu, tpu, or cpu:8"),
        ("8", "--devices is '8'"),
        ("cpu:0", "--devices is 'cpu:0'"),
        ("cpu:", "--devices is 'cpu:'"),
        ("gpu:2", "only a CPU is divided: write gpu"),
        ("cpu:3", "computes on 8 x cpu already"),
    ],
)
def test_devices_that_cant_be_are_refused(text, says, capsys):
    assert main(["eval", "nowhere", "--devices", text]) == 2
    assert says in capsys.readouterr().err


def test_a_mesh_that_is_too_large_names_the_option():
    with pytest.raises(ConfigError, match="needs 48 devices .*--devices cpu:48"):
        make_mesh(MeshConfig(tensor=16, fsdp=3, data=1))
