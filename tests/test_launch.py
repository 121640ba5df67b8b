"""The launch files: each parses, and its commands are ones that `uoe` takes."""

import math
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from uoe_jax.cli.parse import parse, take_preset
from uoe_jax.cli.train import TrainOptions
from uoe_jax.stores.objects import address_of
from uoe_jax.train.peers import _VARIABLES
from uoe_jax.validation import validate

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "docs" / "launch"
FILES = sorted(path.name for path in LAUNCH.iterdir())


def taken(words):
    """The options of a command `uoe train PRESET ...`, as the command reads them."""
    assert words[:2] == ["uoe", "train"]
    preset, rest = take_preset(words[2:], "train")
    options = parse(TrainOptions, rest, "train", default=TrainOptions(config=preset))
    validate(options.config)
    assert options.distributed and options.config.name == "1b-union"
    return options


def devices_of(options):
    mesh = options.config.mesh
    return math.prod((mesh.data or 1, mesh.fsdp, mesh.tensor, mesh.sequence))


def commands(text):
    """Every `uoe train` of a script, its variables filled in."""
    text = re.sub(r"\\\n\s*", " ", text)
    text = re.sub(r"\$\{?(\w+)\}?", r"some-\1", text)
    found = [m[0] for m in re.finditer(r"uoe train .*?(?= \|\| |$)", text, re.M)]
    # Of a command that stands in quotes the last one isn't its own.
    return [shlex.split(c[:-1] if c.count('"') % 2 else c) for c in found]


def test_the_page_names_every_file_and_no_other():
    page = (ROOT / "docs" / "launch.md").read_text()
    assert sorted(set(re.findall(r"\]\(launch/(\S+?)\)", page))) == FILES


@pytest.mark.parametrize("name", [n for n in FILES if n.endswith((".sh", ".sbatch"))])
def test_scripts_are_bash_and_their_commands_are_taken(name):
    text = (LAUNCH / name).read_text()
    checked = subprocess.run(["bash", "-n", LAUNCH / name], capture_output=True)
    assert checked.returncode == 0, checked.stderr
    assert text.startswith("#!/bin/bash\n")
    assert "\nset -euo pipefail\n" in text
    (words,) = commands(text)
    options = taken(words)
    assert devices_of(options) == {"tpu_pod.sh": 16, "slurm.sbatch": 32}[name]


def test_scripts_say_what_isnt_set():
    for name, missing in (("tpu_pod.sh", "NAME"), ("slurm.sbatch", "SHARED")):
        run = subprocess.run(
            ["bash", LAUNCH / name], env={"PATH": "/usr/bin:/bin"}, capture_output=True
        )
        assert run.returncode != 0 and missing in run.stderr.decode()


def programs(folder, **said):
    """Programs that write their arguments to a log and end with a status."""
    for name, status in said.items():
        path = folder / name
        path.write_text(f'#!/bin/bash\necho "{name} $@" >> "$LOG"\nexit {status}\n')
        path.chmod(0o755)
    return {
        "PATH": f"{folder}:/usr/bin:/bin",
        "LOG": str(folder / "log"),
    }


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("", "uoe_jax[tpu,gs,data]"),
        ("git+https://host/o/uoe_jax", "uoe_jax[tpu,gs,data] @ git+https://host/o/uoe_jax"),
    ],
)  # fmt: skip
def test_a_pod_installs_with_extras(tmp_path, source, asked):
    env = programs(tmp_path, gcloud=0)
    given = {"NAME": "n", "ZONE": "z", "TYPE": "v5litepod-16", "BUCKET": "b"}
    run = subprocess.run(
        ["bash", LAUNCH / "tpu_pod.sh"], env={**env, **given, "SOURCE": source}
    )
    assert run.returncode == 0
    (line,) = re.findall(
        r"pip install -q '(.*)'$", (tmp_path / "log").read_text(), re.M
    )
    assert line == asked
    requirement = Requirement(line)
    assert requirement.extras == {"tpu", "gs", "data"}
    assert requirement.url == (source or None)


def test_slurm_asks_for_the_devices_of_its_mesh():
    lines = re.findall(
        r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text_of("slurm.sbatch"), re.M
    )
    asked = dict(lines)
    assert int(asked["nodes"]) * int(asked["gpus-per-node"]) == 32
    assert asked["ntasks-per-node"] == "1" and asked["signal"].startswith("TERM@")


@pytest.mark.parametrize(("code", "again"), [(143, True), (0, False), (1, False)])
def test_slurm_puts_a_job_that_ran_out_of_time_into_the_queue_again(
    tmp_path, code, again
):
    for name, body in (
        ("srun", f'echo "$@" > {tmp_path}/ran; exit {code}'),
        ("scontrol", f'echo "$@" > {tmp_path}/asked'),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    given = {"PATH": path, "SHARED": "/some where", "SLURM_JOB_ID": "7"}
    run = subprocess.run(["bash", LAUNCH / "slurm.sbatch"], env=given)
    assert run.returncode == code
    assert "uoe train 1b-union" in (tmp_path / "ran").read_text()
    asked = tmp_path / "asked"
    assert asked.exists() == again
    assert not again or asked.read_text() == "requeue 7\n"


def text_of(name):
    return (LAUNCH / name).read_text()


def pods(document):
    """The pod specs of a document, wherever they lie."""
    if isinstance(document, dict):
        if "containers" in document:
            yield document
        for value in document.values():
            yield from pods(value)
    elif isinstance(document, list):
        for value in document:
            yield from pods(value)


def test_the_job_names_its_processes_as_jax_reads_them():
    service, job = yaml.safe_load_all(text_of("kubernetes.yaml"))
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    name, spec = job["metadata"]["name"], job["spec"]
    assert service["metadata"]["name"] == spec["template"]["spec"]["subdomain"] == name
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": name}
    assert spec["completionMode"] == "Indexed"
    ((container,),) = [pod["containers"] for pod in pods(job)]
    given = {entry["name"]: entry for entry in container["env"]}
    assert set(given) == {*_VARIABLES, "XDG_CACHE_HOME"}
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert given["XDG_CACHE_HOME"]["value"] == mounted["copies"]
    assert given["JAX_COORDINATOR_ADDRESS"]["value"].startswith(f"{name}-0.{name}:")
    processes = int(given["JAX_NUM_PROCESSES"]["value"])
    assert processes == spec["completions"] == spec["parallelism"] == 4
    field = given["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert "job-completion-index" in field
    options = taken(container["command"])
    chips = container["resources"]["limits"]["nvidia.com/gpu"]
    assert devices_of(options) == processes * chips
    assert address_of(options.run_dir) == "gs://BUCKET/runs/1b-union"
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in spec["template"]["spec"]["volumes"]}


def test_the_slice_has_the_chips_of_its_mesh():
    (document,) = yaml.safe_load_all(text_of("jobset_tpu.yaml"))
    assert document["kind"] == "JobSet"
    (replicated,) = document["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    (pod,) = pods(document)
    (container,) = pod["containers"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(int(side) for side in topology.split("x"))
    hosts = spec["completions"] * replicated["replicas"]
    assert spec["completions"] == spec["parallelism"]
    assert hosts * container["resources"]["limits"]["google.com/tpu"] == chips
    assert devices_of(taken(container["command"])) == chips


def test_the_image_installs_extras_that_exist_from_files_that_do():
    text = re.sub(r"\\\n\s*", " ", text_of("Dockerfile"))
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    steps = [tuple(line.split(None, 1)) for line in lines]
    assert steps[0][0] == "FROM"
    assert {word for word, _ in steps} <= {
        "FROM", "ARG", "WORKDIR", "COPY", "RUN", "ENTRYPOINT",
    }  # fmt: skip
    for word, rest in steps:
        if word == "COPY":
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (asked,) = re.findall(r"\"\.\[(.*?)\]\"", text)
    extras = asked.replace("${EXTRA}", "cuda,tpu").split(",")
    assert set(extras) <= set(project["optional-dependencies"])
    python = re.search(r"python:(\d+\.\d+)", steps[0][1])[1]
    assert project["requires-python"] == f">={python}"
    assert steps[-1] == ("ENTRYPOINT", '["uoe"]')
