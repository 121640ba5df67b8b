"""The training loop: one dispatched step after another, metrics read one step late."""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import PyTree

from uoe_jax.config import ExperimentConfig
from uoe_jax.data import Dataset, make_dataset, prefetch
from uoe_jax.data.record import record_of
from uoe_jax.errors import NonFiniteError, out_of_memory
from uoe_jax.hardware.devices import peak_flops
from uoe_jax.ops.dispatch import served
from uoe_jax.optim import make_optimizer
from uoe_jax.partition.mesh import mesh_for
from uoe_jax.runs.checkpoint import Checkpoints, snapshot
from uoe_jax.runs.device_order import read_order, write_order
from uoe_jax.runs.folder import (
    BEST,
    CHECKPOINTS,
    METRICS,
    as_recorded,
    check_saved,
    has_begun,
    open_run_dir,
    write_environment,
)
from uoe_jax.runs.lock import RunLock
from uoe_jax.runs.state import (
    Progress,
    check_32_bits,
    check_buffers,
    from_saved,
    to_saved,
)
from uoe_jax.runs.stored import publish, refresh, run_folder
from uoe_jax.stores.mirror import named
from uoe_jax.train.clock import Clock, Rate
from uoe_jax.train.diagnose import diagnose, write_dump
from uoe_jax.train.feed import flop_share, train_batch, whole_batch
from uoe_jax.train.header import describe_operations, describe_run
from uoe_jax.train.memory import explain_memory, settle_memory
from uoe_jax.train.metrics import MetricsLog, check_sinks
from uoe_jax.train.peers import Votes, barrier, is_primary, primary_first
from uoe_jax.train.progress import Display
from uoe_jax.train.replay import make_replay
from uoe_jax.train.resume import (
    check_not_lost,
    describe_newer,
    describe_rate_jump,
    describe_resharding,
)
from uoe_jax.train.signals import StopRun, StopSignals
from uoe_jax.train.stages import (
    STAGES,
    at_stage,
    describe_stages,
    stage_at,
    stage_number,
)
from uoe_jax.train.step import make_step
from uoe_jax.train.subject import MakeSubject, Subject, whole_model
from uoe_jax.train.teacher import find_teacher, with_teacher
from uoe_jax.train.validate import make_eval_step, run_validation
from uoe_jax.train.watch import Watch, watch_peers
from uoe_jax.tree import fill_leaves, named_leaves
from uoe_jax.validation import validate

_STOP, _TIME_UP = 1, 2  # what processes vote for, the larger one wins
_PROFILE_STEPS = range(3, 6)  # steps of this process that --profile traces


def train(
    config: ExperimentConfig,
    run_dir: Path,
    *,
    resume: bool = True,
    quiet: bool = False,
    resume_step: int | None = None,
    optimizer: optax.GradientTransformationExtraArgs | None = None,
    make_subject: MakeSubject = whole_model,
) -> dict[str, Any]:
    """Train into `run_dir` until a budget ends and return a summary.

    Called again with the same config it continues from the newest checkpoint, or from
    `resume_step`, bit for bit as if it had never stopped. `optimizer` replaces the
    config's; its `update` gets the step as `step=`. `make_subject` says what is
    trained, if not a whole model.

    Raises ConfigError, DataError or CheckpointError before anything compiles,
    NonFiniteError after `max_bad_steps` bad steps in a row, ReplayError where gradients
    don't repeat, OutOfMemory with what would fit, StopRun after a signal.
    """
    validate(config)
    check_32_bits()
    check_sinks(config)
    run_dir = run_folder(run_dir, "run_dir", writes=True)
    config, order = as_recorded(run_dir, config), config.layout.device_order
    mesh = mesh_for(config, recorded=read_order(run_dir, order) if resume else None)
    config, settled = settle_memory(config, mesh)
    with ExitStack() as stack:
        quiet = quiet or not is_primary()
        display = stack.enter_context(
            Display(quiet=quiet, log_every=config.train.log_every)
        )
        watch = stack.enter_context(watch_peers())
        # Before the folder is touched: data that can't serve leaves nothing behind.
        # One process prepares it for all that see the same data.cache_dir.
        data = primary_first(
            "data is prepared",
            lambda: (make_dataset(config, "train"), make_dataset(config, "valid")),
        )
        teacher = find_teacher(config, run_dir)
        lock = None
        if is_primary():
            lock = stack.enter_context(
                open_run_dir(
                    run_dir,
                    config,
                    resume=resume,
                    note=display.note,
                    data=record_of(data[0].prepared),
                )
            )
        else:
            stack.callback(publish, run_dir)  # its own metrics
        told = describe_run(config, mesh, data[0].prepared.manifest, run_dir)
        told += [line for line in (settled, describe_stages(config)) if line]
        told += [] if teacher is None else [teacher.describe(config)]
        for line in told:
            display.note(line)
        if is_primary():
            write_order(run_dir, order, mesh)
        if is_primary() and teacher is not None:
            teacher.record(run_dir)
        signals = stack.enter_context(StopSignals())
        if optimizer is None:
            optimizer = make_optimizer(config.optim, config.train.steps)
        try:
            subject = make_subject(config, optimizer, mesh)
            if teacher is not None:
                subject = with_teacher(subject, teacher, config, mesh)
            run = _Run(config, run_dir, data, mesh, subject, display, signals)
            run.lock, run.watch = lock, watch
            run.restore(resume_step)
            watch.at(run.step)
            return run.train()
        except Exception as error:
            if out_of_memory(error):
                raise explain_memory(config, mesh, error) from error
            raise


class _Run:
    """One process's part of a run."""

    def __init__(
        self,
        config: ExperimentConfig,
        run_dir: Path,
        data: tuple[Dataset, Dataset],
        mesh: jax.sharding.Mesh,
        subject: Subject,
        display: Display,
        signals: StopSignals,
    ):
        self.config, self.run_dir, self.mesh = config, run_dir, mesh
        self.display, self.signals = display, signals
        self.progress = Progress()
        self.clock = Clock(self.progress)
        self.data, self.valid = data
        self.subject, self.state = subject, subject.state
        about = (mesh, subject.layout, subject.objective)
        self.eval_fn: Any = make_eval_step(config, subject.graphdef, *about)
        self.layout = subject.layout
        self.votes = Votes(mesh)
        self.checkpoints = Checkpoints(
            run_dir / CHECKPOINTS,
            keep=config.train.keep_checkpoints,
            about={"mesh": dict(mesh.shape)},
        )
        self.best = Checkpoints(run_dir / BEST)
        self.step, self.fresh = 0, True
        self.lock: RunLock | None = None
        self.watch: Watch | None = None
        self.pending: tuple[int, PyTree] | None = None
        # Of a warm-up of top_k; without one all is as at its end.
        self.stage_number, self.stage, self.staged = STAGES, config, subject
        self.make_programs()
        peak = peak_flops(mesh.devices.flat[0].device_kind)
        self.peak = peak * mesh.size if peak else None
        self.rate = Rate(config.train.log_every)
        self.tracing = False
        self.compiled: dict[str, Any] = {}
        self.about: dict[str, Any] = {}

    def make_programs(self) -> None:
        """Make the step, and what repeats it, of the stage the run is in."""
        config, subject = self.stage, self.staged
        about = (self.mesh, subject.layout, subject.objective)
        graphdef, optimizer = subject.graphdef, subject.optimizer
        self.step_fn: Any = make_step(config, graphdef, optimizer, *about)
        repeats = config.train.replay_every > 0
        self.replay = make_replay(config, subject) if repeats else None
        self.flops_per_token = subject.flops_per_token

    def follow_stage(self) -> bool:
        """Go on with the programs of the step's stage; whether they are others."""
        step = self.step - self.progress.first_step
        number = stage_number(self.config, step)
        if number == self.stage_number:
            return False
        self.stage_number, stage = number, stage_at(self.config, step)
        if stage == self.stage:  # no expert less than in the one before
            return False
        self.drain()
        self.stage, self.staged = stage, at_stage(self.subject, self.config, stage)
        self.make_programs()
        return True

    def restore(self, step: int | None) -> None:
        """Continue from a checkpoint if there is one."""
        if is_primary() and step is None:
            check_not_lost(self.run_dir, self.checkpoints, self.best)
        for store in (self.checkpoints, self.best) if is_primary() else ():
            unfinished = store.discard_unfinished()
            for number in unfinished if store is self.checkpoints else ():
                self.display.note(f"step {number} was unfinished, ignored")
        barrier("unfinished checkpoints are gone")
        if not is_primary():
            refresh(self.run_dir)
        if not self.checkpoints.steps() and step is None:
            return
        fresh = named_leaves(self.state)
        template = to_saved(fresh)
        optional = {name for name in template if name.startswith("loss_level.")}
        if not has_begun(self.run_dir):  # an imported model has no optimizer's state
            later = ("opt_state.", "trained.")
            optional |= {name for name in template if name.startswith(later)}
        self.step, arrays, progress = self.checkpoints.restore(
            template, step=step, optional=optional
        )
        self.fresh = False
        saved = self.checkpoints.config(self.step)
        check_saved(self.run_dir, self.config, saved, self.step)
        barrier("checkpoint is read")
        check_buffers(self.run_dir, self.config.model, arrays)
        # A checkpoint of a run without `max_loss_jump` has no level: it begins anew.
        arrays = from_saved(self.layout.to_memory(arrays), fresh)
        begun = {name: fresh[name] for name in fresh.keys() - arrays.keys()}
        state = fill_leaves(self.state, arrays | begun)
        self.state = self.layout.place(state)
        self.progress = self.clock.resume(Progress(**progress))
        self.display.note(f"resuming from step {self.step}")
        about = self.checkpoints.about(self.step)
        for text in (
            describe_newer(self.step, self.checkpoints, self.best),
            describe_resharding(about, self.mesh.shape),
            describe_rate_jump(self.step, saved, self.config),
        ):
            if text:
                self.display.note(text)

    def train(self) -> dict[str, Any]:
        """Run the loop to the end of a budget; return the summary."""
        self.open_metrics()
        if self.fresh and self.subject.note:
            self.display.note(self.subject.note)
        try:
            if self.step > 0 and self.votes.settle(self.out_of_time()):
                self.display.note(f"step {self.step}: max_seconds is used up")
            elif self.step < self.config.train.steps:
                self.prepare()
                if self.step == 0 and self.subject.validate_start:
                    self.validate()
                self.display.start(self.step, self.config.train.steps)
                self.loop()
            elif self.step == 0:  # no steps asked for: the run holds a fresh model
                self.validate()
                self.save(self.checkpoints)
            else:
                self.display.note(f"step {self.step}: all steps are taken")
            self.checkpoints.close()
            self.best.close()
        finally:
            self.checkpoints.wait()
            self.best.wait()
            self.report_failures()
            self.metrics.close()
        return self.summary()

    def prepare(self) -> None:
        """Compile the step; meanwhile a new run saves its first state.

        So a run that can't be saved ends before it has cost anything.
        """
        if self.fresh:
            self.save(self.checkpoints)
        self.follow_stage()
        self.compile()
        if self.fresh:
            self.checkpoints.confirm()

    def open_metrics(self) -> None:
        """Open the run's log, each process its own, and note the environment."""
        name = METRICS if is_primary() else f"metrics-{jax.process_index()}.jsonl"
        # A start that is validated is so again until a step is saved.
        again = self.step == 0 and self.subject.validate_start
        last = -1 if again else self.step
        self.metrics = MetricsLog(self.run_dir / name, last, self.display.warn)
        if is_primary():
            self.metrics.add_sinks(self.config, self.run_dir, self.display.warn)
            self.about = {"mesh": dict(self.mesh.shape), "data": self.data.manifest}
            self.about |= {"processes": jax.process_count(), **self.subject.about}
            write_environment(self.run_dir, self.about)

    def compile(self) -> None:
        """Compile the step ahead, so that its time isn't counted as training."""
        self.display.note("compiling the training step ...")
        start = time.perf_counter()
        batch = self.batch(self.step)
        with ThreadPoolExecutor(1) as beside:
            waits = self.begin_validation(beside)
            lowered = self.step_fn.lower(self.state, batch, self.subject.frozen)
            self.tell_operations()
            self.step_fn = lowered.compile()
            if waits is not None:
                self.eval_fn = waits.result()
        seconds = time.perf_counter() - start
        memory = self.step_fn.memory_analysis()
        self.compiled = {
            "compile_seconds": seconds + self.compiled.get("compile_seconds", 0.0),
            "temporary_bytes": getattr(memory, "temp_size_in_bytes", None),
        }
        self.display.note(f"compiled in {seconds:.1f} s")

    def begin_validation(self, beside: ThreadPoolExecutor) -> Future | None:
        """Compile the validation beside the step; None where that is for later.

        It is if it is compiled, or nothing is validated. Of several processes each
        compiles it when it comes to it, so that all do so in one order.
        """
        there = isinstance(self.eval_fn, jax.stages.Compiled)
        if there or not self.valid.num_batches or jax.process_count() > 1:
            return None
        state = self.state
        batch = whole_batch(self.valid.batch(0), self.mesh)
        lower: Any = self.eval_fn.lower
        lowered = lower(state.used, state.buffers, batch, self.subject.frozen)
        return beside.submit(lowered.compile)

    def tell_operations(self) -> None:
        """Say which backend computes each operation, and write it down."""
        if not served:
            return
        self.display.note(describe_operations(served))
        if is_primary():
            self.about["operations"] = {op: "+".join(n) for op, n in served.items()}
            write_environment(self.run_dir, self.about)

    def batch(self, step: int) -> dict[str, jax.Array]:
        """Return a training batch on the devices."""
        return train_batch(self.data, step, self.mesh, self.config.train.accumulate)

    def loop(self) -> None:
        """Dispatch steps; pause for validation, checkpoints and the end."""
        train, first = self.config.train, self.step
        with prefetch(self.batch, self.step, train.steps) as batches:
            for batch in batches:
                self.profile(self.step - first)
                if self.lock is not None:
                    self.lock.check()
                if self.follow_stage():
                    self.compile()
                self.check_repeats(batch)
                self.clock.run()
                self.state, metrics = self.step_fn(
                    self.state, batch, self.subject.frozen
                )
                self.step += 1
                if self.watch is not None:
                    self.watch.at(self.step)
                previous, self.pending = self.pending, (self.step, metrics)
                self.read(previous)
                vote = _STOP if self.signals.received else 0
                vote = self.votes.cast(_TIME_UP if self.out_of_time() else vote)
                last = self.step >= train.steps or vote == _TIME_UP
                # Before a stop too, so that a resumed run has the same validations.
                if last or self.step % train.eval_every == 0:
                    self.validate()
                if vote == _STOP and not last:
                    self.stop()
                if last or self.step % train.save_every == 0:
                    self.save(self.checkpoints)
                if last:
                    break
        self.profile(_PROFILE_STEPS.stop)

    def check_repeats(self, batch: dict[str, jax.Array]) -> None:
        """Raise ReplayError if the next step's gradients differ when repeated."""
        if self.replay is None or (self.step + 1) % self.config.train.replay_every:
            return
        self.drain()
        self.replay(self.state, batch, self.subject.frozen, self.step + 1)

    def out_of_time(self) -> bool:
        """Whether the wall-clock budget is used up."""
        self.clock.update()
        limit = self.config.train.max_seconds
        return limit is not None and self.progress.elapsed >= limit

    def drain(self) -> None:
        """Wait for the steps dispatched and stop the training clock."""
        pending, self.pending = self.pending, None
        self.read(pending)
        jax.block_until_ready(self.state)
        self.clock.pause()

    def read(self, pending: tuple[int, PyTree] | None) -> None:
        """Write and show the metrics of a dispatched step."""
        if pending is None:
            return
        step, metrics = pending
        routing = metrics.pop("router")
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        self.clock.update()
        progress = self.progress
        tokens, bad = int(values.pop("tokens")), int(values.pop("bad_steps"))
        progress.tokens += tokens
        flops_per_token = self.flops_per_token * flop_share(self.data, step - 1)
        progress.flops += tokens * flops_per_token
        jumps, limit = int(values.pop("jumps", 0)), values.pop("loss_limit", math.inf)
        if not bad:
            self.tell_of_jump(step, values["loss"], jumps, limit)
        progress.skipped += bad > 0 or jumps > 0
        if not bad and not jumps:
            progress.train_loss = values["loss"]
        rate = self.rate.add(progress.seconds, progress.tokens)
        speed = rate * flops_per_token if rate else None
        line = {
            "kind": "train",
            "step": step,
            "seconds": progress.seconds,
            **values,
            "tokens": progress.tokens,
            "flops": progress.flops,
            "tokens_per_second": rate,
            "mfu": speed / self.peak if speed and self.peak else None,
            "skipped": progress.skipped,
        }
        if routing and step % self.config.train.log_every == 0:
            line["router"] = jax.tree.map(lambda a: np.asarray(a).tolist(), routing)
        self.metrics.write(line)
        self.display.step(line)
        if bad >= self.config.train.max_bad_steps:
            self.give_up(step, bad)

    def tell_of_jump(self, step: int, loss: float, jumps: int, limit: float) -> None:
        """Say when losses begin to jump, and when a level that stays is accepted."""
        if jumps == 1:
            self.display.note(
                f"step {step}: the loss jumped to {loss:.4f}, above {limit:.4f}; the "
                "step is left out"
            )
        elif not jumps and loss > limit:
            self.display.note(
                f"step {step}: the loss stays above {limit:.4f}; {loss:.4f} is its new "
                "level"
            )

    def validate(self) -> None:
        """Validate, log it, and keep the state if it is the best one so far."""
        self.drain()
        values = run_validation(
            self.eval_fn,
            self.state.used,
            self.state.buffers,
            self.valid,
            self.mesh,
            self.config.train.eval_batches,
            self.subject.frozen,
        )
        progress = self.progress
        routing = values.pop("router")
        line = {
            "kind": "eval",
            "split": "valid",
            "step": self.step,
            "seconds": progress.seconds,
            "tokens": progress.tokens,
            "flops": progress.flops,
            **values,
        }
        progress.valid = dict(line)
        self.metrics.write({**line, "router": routing} if routing else line)
        self.display.note(f"step {self.step}: validation {describe_eval(line)}")
        best = math.inf if progress.best_loss is None else progress.best_loss
        if values["loss"] < best:
            progress.best_loss, progress.best_step = values["loss"], self.step
            self.save(self.best)

    def save(self, store: Checkpoints) -> None:
        """Start saving; what fails is a warning now and an error only at the end."""
        self.drain()
        if self.lock is not None:
            self.lock.look()
            self.lock.check()
        self.metrics.sync()
        self.clock.update()
        store.save(
            self.step,
            to_saved(self.layout.to_file(snapshot(self.state))),
            dataclasses.asdict(self.config),
            self.progress.as_json(),
        )
        self.report_failures()

    def report_failures(self) -> None:
        """Warn of writes that failed since the last call."""
        for writer in (self.checkpoints, self.best, self.metrics):
            for failure in writer.poll():
                self.display.warn(f"{failure}; training continues")

    def stop(self) -> None:
        """Save and raise StopRun for the signal received."""
        received = self.signals.received or signal.SIGTERM  # of another process
        self.save(self.checkpoints)
        self.checkpoints.close()
        self.best.close()
        raise StopRun(
            f"stopped by {received.name} after step {self.step}, saved in "
            f"{self.run_dir}; the same command continues",
            128 + received,
        )

    def give_up(self, step: int, bad: int) -> None:
        """Write what wasn't finite and raise NonFiniteError."""
        dump = diagnose(
            self.stage,
            dataclasses.replace(self.staged, state=self.state),
            self.data.batch(step - 1),
            step,
        )
        path = write_dump(self.run_dir, dump)
        names = (
            dump["nonfinite_parameters"]
            or dump["nonfinite_router"]
            or dump["nonfinite_gradients"]
            or ["the loss"]
        )
        raise NonFiniteError(
            f"loss or gradient wasn't finite {bad} steps in a row up to step {step}: "
            f"{', '.join(names[:3])}; details in {path}; lower optim.learning_rate "
            "or look at that batch"
        )

    def profile(self, taken: int) -> None:
        """Trace a few steps into RUN/profile if the config asks for it."""
        if not self.config.train.profile:
            return
        if taken == _PROFILE_STEPS.start:
            self.drain()
            jax.profiler.start_trace(str(self.run_dir / "profile"))
            self.tracing = True
        elif taken == _PROFILE_STEPS.stop and self.tracing:
            self.drain()
            jax.profiler.stop_trace()
            self.tracing = False
            self.display.note(f"profile written to {self.run_dir / 'profile'}")

    def summary(self) -> dict[str, Any]:
        """Return where the run stands."""
        return {
            "run_dir": named(self.run_dir),
            "step": self.step,
            **self.progress.as_json(),
            **self.compiled,
        }


def describe_eval(line: Mapping[str, Any]) -> str:
    """Return a validation line as text."""
    text = f"loss {line['loss']:.4f}"
    if line["bits_per_byte"] is not None:
        text += f"  {line['bits_per_byte']:.4f} bits/byte"
    return text + f"  accuracy {line['accuracy']:.1%}"
