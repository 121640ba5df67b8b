"""Which test types each option of each verb as a command, to its end.

`test_options.py` fails for an option that stands neither here nor in `UNTESTED`, and
for a test that doesn't hold the option. A new option needs a line here.
"""

import importlib

# Options of each verb; those of a config (--model...) are tried one by one.
CLASSES = {
    "demo": "uoe_jax.cli.demo:DemoOptions",
    "train": "uoe_jax.cli.train:TrainOptions",
    "eval": "uoe_jax.cli.runs:EvalOptions",
    "generate": "uoe_jax.cli.runs:GenerateOptions",
    "report": "uoe_jax.cli.runs:ReportOptions",
    "runs": "uoe_jax.cli.search:RunsOptions",
    "decompose": "uoe_jax.cli.decompose:DecomposeOptions",
    "leakcheck": "uoe_jax.cli.checks:LeakOptions",
    "data": "uoe_jax.cli.checks:DataOptions",
    "bench": "uoe_jax.bench.request:BenchRequest",
    "plan": "uoe_jax.cli.plan:PlanOptions",
    "topology": "uoe_jax.cli.topology:TopologyOptions",
    "adapt": "uoe_jax.cli.adapt:AdaptOptions",
    "complete": "uoe_jax.complete.options:CompleteArgs",
    "cost": "uoe_jax.cli.cost:CostOptions",
    "import": "uoe_jax.cli.interop:ImportOptions",
    "export": "uoe_jax.cli.interop:ExportOptions",
    "sweep": "uoe_jax.cli.sweep:SweepOptions",
    "presets": "uoe_jax.cli.presets:PresetsOptions",
    "config": "uoe_jax.cli.presets:ConfigOptions",
}

HERE = "cli/test_options.py"

# verb -> option -> the test file that types it.
TESTED: dict[str, dict[str, str]] = {
    "import": {
        "--run-dir": "interop/test_verbs.py",
        "--dtype": "interop/test_verbs.py",
        "--json": "interop/test_verbs.py",
    },
    "export": {
        "--checkpoint": "interop/test_verbs.py",
        "--json": "interop/test_verbs.py",
    },
    "sweep": {
        "--grid": "cli/test_sweep_command.py",
        "--name": "cli/test_sweep_command.py",
        "--samples": "cli/test_sweep_command.py",
        "--draw-seed": "cli/test_sweep_command.py",
        "--out": "cli/test_sweep_command.py",
        "--gpus": "cli/test_sweep_command.py",
        "--budget-seconds": "cli/test_sweep_command.py",
        "--dry-run": "cli/test_sweep_command.py",
        "--json": "cli/test_sweep_command.py",
    },
    "presets": {"--json": "cli/test_help.py"},
    "config": {"--name": "cli/test_help.py"},
    "demo": {
        "--steps": "cli/test_demo.py",
        "--quiet": "cli/test_demo.py",
        "--run-dir": "cli/test_demo.py",
    },
    "train": {
        "--name": "cli/test_rest_of_options.py",
        "--distributed": "train/test_together.py",
        "--resume": "cli/test_rest_of_options.py",
        "--resume-step": "cli/test_rest_of_options.py",
        "--init-from": "cli/test_init_from.py",
        "--init-partial": "cli/test_init_from.py",
        "--layout": "cli/test_printable.py",
        "--quiet": "cli/conftest.py",
        "--recall": "cli/test_search.py",
        "--report": "cli/test_decompose.py",
        "--run-dir": "cli/conftest.py",
    },
    "eval": {
        "--checkpoint": "cli/test_adapt.py",
        "--json": "cli/test_adapt.py",
        "--max-batches": "cli/test_compile_cache.py",
        "--split": "cli/test_data_options.py",
    },
    "generate": {
        "--greedy": "cli/test_data_options.py",
        "--max-new-tokens": "cli/test_data_options.py",
        "--prompt": "cli/test_adapt.py",
        "--raw": "cli/test_data_options.py",
        "--seed": "cli/test_adapt.py",
        "--temperature": "cli/test_data_options.py",
        "--top-k": "cli/test_data_options.py",
        "--top-p": "cli/test_data_options.py",
    },
    "runs": {
        "--sort": "cli/test_search.py",
        "--descending": "cli/test_search.py",
        "--where": "cli/test_search.py",
        "--columns": "cli/test_search.py",
        "--limit": "cli/test_search.py",
        "--metric": "cli/test_search.py",
        "--page": "cli/test_search.py",
        "--map": "cli/test_search.py",
        "--json": "cli/test_search.py",
    },
    "report": {
        "--out": "cli/test_printable.py",
        "--overlay": "cli/test_printable.py",
    },
    "decompose": {
        "--shared": "cli/test_decompose.py",
        "--refit": "cli/test_decompose.py",
        "--attention-experts": "cli/test_rest_of_options.py",
        "--checkpoint": "cli/test_rest_of_options.py",
        "--parts": "cli/test_rest_of_options.py",
        "--router": "cli/test_rest_of_options.py",
        "--seed": "cli/test_rest_of_options.py",
        "--calibrate": "cli/test_decompose.py",
        "--experts": "cli/test_decompose.py",
        "--grouping": "cli/test_decompose.py",
        "--json": "cli/test_decompose.py",
        "--merge": "cli/test_decompose.py",
        "--out": "cli/test_decompose.py",
        "--top-k": "cli/test_decompose.py",
    },
    "leakcheck": {
        "--length": HERE,
        "--seed": HERE,
    },
    "data": {
        "--name": "cli/test_rest_of_options.py",
        "--json": "cli/test_data_options.py",
        "--raw": "cli/test_data_options.py",
    },
    "bench": {
        "--size": HERE,
        "--rounds": "cli/test_bench.py",
        "--tune": HERE,
        "--out": "cli/test_bench.py",
        "--plot": "cli/test_bench.py",
        "--products": "cli/test_bench_gemm.py",
        "--seed": "cli/test_bench_gemm.py",
    },
    "plan": {
        "--name": HERE,
        "--gemm": "cli/test_bench_gemm.py",
        "--topology": HERE,
        "--budget": HERE,
        "--compile": HERE,
        "--kernels": HERE,
        "--max-seconds": HERE,
        "--calibration": HERE,
        "--fit": HERE,
        "--out": HERE,
        "--show": HERE,
        "--json": HERE,
        "--html": HERE,
    },
    "topology": {
        "--graph": "cli/test_topology.py",
        "--mesh": "cli/test_topology.py",
        "--bytes": "cli/test_topology.py",
        "--dead": "cli/test_topology.py",
        "--eps": "cli/test_topology.py",
        "--seconds": "cli/test_topology.py",
        "--seed": "cli/test_topology.py",
        "--json": "cli/test_topology.py",
        "--picture": "cli/test_topology.py",
    },
    "adapt": {
        "--alpha": "cli/test_adapt.py",
        "--batch-size": "cli/test_adapt.py",
        "--checkpoint": "cli/test_adapt.py",
        "--data": "cli/test_adapt.py",
        "--dora": "cli/test_adapt.py",
        "--dropout": "cli/test_adapt.py",
        "--init": "cli/test_adapt.py",
        "--json": "cli/test_adapt.py",
        "--learning-rate": "cli/test_adapt.py",
        "--load": "cli/test_adapt.py",
        "--merge": "cli/test_adapt.py",
        "--method": "cli/test_adapt.py",
        "--out": "cli/test_adapt.py",
        "--path": "cli/test_adapt.py",
        "--quiet": "cli/test_adapt.py",
        "--rank": "cli/test_adapt.py",
        "--rank-pattern": "cli/test_adapt.py",
        "--rslora": "cli/test_adapt.py",
        "--seed": "cli/test_adapt.py",
        "--share-experts": "cli/test_adapt.py",
        "--split-heads": "cli/test_adapt.py",
        "--steps": "cli/test_adapt.py",
        "--targets": "cli/test_adapt.py",
    },
    "complete": {
        "--bias-ridge": "complete/test_complete_options.py",
        "--biases": "complete/test_complete_options.py",
        "--columns": "complete/test_complete_options.py",
        "--decimal": "complete/test_complete_options.py",
        "--delimiter": "complete/test_complete_options.py",
        "--float64": "complete/test_complete_options.py",
        "--holdout": "complete/test_complete_options.py",
        "--iters": "complete/test_complete_options.py",
        "--out": "complete/test_complete_options.py",
        "--patience": "complete/test_complete_options.py",
        "--predict": "complete/test_complete_options.py",
        "--quiet": "complete/test_complete_options.py",
        "--rank": "complete/test_complete_options.py",
        "--refit": "complete/test_complete_options.py",
        "--ridge": "complete/test_complete_options.py",
        "--ridge-power": "complete/test_complete_options.py",
        "--seed": "complete/test_complete_options.py",
        "--solver": "complete/test_complete_options.py",
        "--tol": "complete/test_complete_options.py",
    },
    "cost": {
        "--device": "cli/test_cost_decode.py",
        "--context": "cli/test_cost_decode.py",
        "--name": HERE,
        "--gemm": "cli/test_bench_gemm.py",
        "--batch": HERE,
        "--seq-len": HERE,
        "--json": HERE,
    },
}

# Not yet typed by a test that runs the command to its end; only ever shorter.
UNTESTED: dict[str, set[str]] = {
    "export": {"--out"},  # has no name: it stands behind the run
}


def load(verb):
    """Return the dataclass of a verb's options."""
    module, name = CLASSES[verb].split(":")
    return getattr(importlib.import_module(module), name)
