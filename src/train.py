"""One training run of llama2_70b_lora: settings -> init_start -> build -> fit -> exit status.

Exit status: 0 the target was reached, 1 it was not (MAX_STEPS, an error, a signal), 2 the settings are wrong.
Started by scripts/run_and_time.sh, once per GPU. Read on in settings.py, training/recipe.py and training/callback.py.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from contextlib import nullcontext
from pathlib import Path

from llama2_lora.config.settings import Settings, SettingsError
from llama2_lora.findings import one_line
from llama2_lora.mlperf_log import MLPerfLog
from llama2_lora.node.files import check_data, check_paths, check_shape
from llama2_lora.weights.checkpoint import check_checkpoint, read_shape

MESSAGE_CHARACTERS = 2000


def main() -> int:
    try:
        settings = Settings.from_env()
        check_paths(settings)
        shape = read_shape(Path(settings.run.checkpoint_path))
        check_shape(settings, shape)
        check_checkpoint(Path(settings.run.checkpoint_path), shape, settings.weights_dtype)
        check_data(settings, shape.vocab)
    except (SettingsError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    log = MLPerfLog(settings.system.rank)
    log.init_start()  # before the imports of torch and NeMo: they take seconds, and their time counts
    try:
        return 0 if train(settings, shape, log) else 1
    except BaseException as error:  # a signal too: Lightning's SIGTERMException is a SystemExit of status 0
        print(f"error: rank {settings.system.rank}: {describe(error)}", file=sys.stderr, flush=True)
        return 1


def describe(error: BaseException) -> str:
    """One line. Where nobody wrote it for the user (KeyError: 'x'), it says the place in the code as well."""
    if isinstance(error, (SystemExit, KeyboardInterrupt)):
        return "stopped by a signal"
    if isinstance(error, (ValueError, OSError, RuntimeError)):
        return one_line(str(error), limit=MESSAGE_CHARACTERS)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return one_line(f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})", limit=MESSAGE_CHARACTERS)


def train(settings: Settings, shape, log: MLPerfLog) -> bool:
    """Build everything and fit. Returns whether the run reached the target loss."""
    warnings.simplefilter("ignore")  # hundreds of lines a rank in which libraries talk about themselves; errors stay
    if settings.system.platform == "cpu":
        from llama2_lora.training.cpu import capability_for, cpu_platform

        platform = cpu_platform(capability_for(settings.precision))
    else:
        platform = nullcontext()
    with platform:
        return fit(settings, shape, log)


def fit(settings: Settings, shape, log: MLPerfLog) -> bool:
    """The same, where PLATFORM's kernels are in place."""
    from llama2_lora.training import graphs, observe, recipe, run
    from llama2_lora.training.callback import MLPerfCallback
    from llama2_lora.training.clipping import clipping_on_device
    from llama2_lora.training.data import GovReport
    from llama2_lora.training.healing import Heal
    from llama2_lora.training.warmup import WarmUp

    run.quiet_libraries()
    run.unset_attention_choices()
    if settings.performance.graphs != "none":
        graphs.unset_expandable_segments()
    store = run.rendezvous(settings)
    seed = run.shared_seed(settings, store)
    strategy = recipe.build_strategy(settings, seed, store)
    data = GovReport(settings, seed, shape.vocab)
    lora = recipe.build_lora(settings, seed)
    model = recipe.build_model(settings, shape, lora, recipe.build_optimizer(settings), data.validation_rows)
    warm_up, watch = WarmUp(settings), run.watch(settings, store, log)
    callback = MLPerfCallback(settings, log, seed, warm_up)
    after = [*observe.callbacks(settings, seed)]  # its files are written after run_stop
    after += [run.SaveAdapter(settings, shape, seed)] if settings.run.save_adapter else []
    heal = [Heal(settings, log)] if settings.precision.fp4_heal_step else []
    trainer = recipe.build_trainer(settings, strategy, [lora, warm_up, callback, watch, *heal, *after])
    with watch, run.no_garbage_collection(), clipping_on_device():
        trainer.fit(model, data)
    return callback.reached_target


if __name__ == "__main__":
    sys.exit(main())
