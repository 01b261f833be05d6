"""The command `fedssl-evaluate`: everything that can be measured of a finished run.

Exit codes: 0 done; 2 bad input; 1 a bug, or weights that are of no use; 130 interrupted, and nothing written. It lies
beside the package `fedssl.evaluate`, as that imports torch, which --help need not wait for.
"""

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedssl.config import EVALUATION_NAME, compose_evaluation, conf_dir, fill_in, instantiate
from fedssl.environment import keep_memory, set_defaults
from fedssl.errors import ConfigError, FedSSLError

if TYPE_CHECKING:
    from fedssl.report.runs import Run

OK, BUG, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

DESCRIPTION = """\
Measure the models of a finished run, beside the same networks before training, and write RUN/evaluation.json:
kNN and linear probes, the linear probe and fine-tuning with 1 % and 10 % of the labels, each client's own mix of
classes, alignment, uniformity, ranks, instance discrimination and linear CKA. Nothing of the run is changed. The same
command again replaces its file; one that was made with other settings is replaced only where -o names it."""

EXAMPLES = """\
fedssl-evaluate runs/flesd                                  everything, with the run's own labelled data
fedssl-evaluate runs/flesd evaluate.data=cifar100 evaluate.root=data
                                                            transfer: another data set, at the run's image size;
                                                            goes to RUN/evaluation-cifar100.json
fedssl-evaluate runs/flesd evaluate.finetune.shares=[] -o quick.json
                                                            without fine-tuning, which takes most of the time
fedssl-evaluate runs/flesd evaluate.replay_clients=true     how far each client's model is from the global one

Overrides are evaluate.<key>=..., device=auto|cpu|cuda, data.root=DIR, and client.store=DIR where that folder of the run
was moved. The keys are those of evaluate in the run's config.yaml (data, root, raw_pixels, batch_size, knn, linear,
labels, logistic) and:

"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    sys.path.append(str(Path.cwd()))  # a user's own modules, as `fedssl` finds them
    set_defaults()
    keep_memory()
    arguments = _parser().parse_intermixed_args(argv)
    try:
        _evaluate(arguments.run, arguments.overrides, arguments.config_dir, arguments.out)
    except FedSSLError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr, flush=True)
        return INTERRUPTED
    except Exception:
        traceback.print_exc()
        return BUG
    return OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedssl-evaluate",
        description=DESCRIPTION,
        epilog=EXAMPLES + (conf_dir() / f"{EVALUATION_NAME}.yaml").read_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the directory of a completed run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as in `fedssl`")
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        metavar="FILE",
        help="where the results go, replacing whatever evaluation is there (default: RUN/evaluation.json; "
        "RUN/evaluation-NAME.json on other data)",
    )
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="a folder with YAML files of your own")
    return parser


def _evaluate(run_dir: Path, overrides: Sequence[str], config_dir: Path | None, given: Path | None) -> None:
    from fedssl.federation.evaluation import FinishedRun, RunEvaluation  # Flower: not for --help
    from fedssl.federation.grids.in_process import torch_threads
    from fedssl.federation.setup import Setup
    from fedssl.federation.simulation import store_root
    from fedssl.federation.store import ClientStore
    from fedssl.tracking import duration, write_json

    started = time.monotonic()
    ended = _completed(run_dir)
    saved, summary, rounds = fill_in(ended.config), ended.summary, int(ended.summary["rounds"])
    config, node = compose_evaluation(saved, overrides, config_dir=config_dir)
    thorough = instantiate(node)
    _check_store(saved, config)
    setup = Setup(config, run_dir)
    run = FinishedRun(
        setup=setup,
        as_it_ran=Setup({**config, "evaluate": saved["evaluate"]}, run_dir),
        run_dir=run_dir,
        store=ClientStore(store_root(config, run_dir), writable=False),
        rounds=rounds,
        replied=[row["partition"] for row in ended.rows if (row["scope"], row["round"]) == ("client", rounds)],
    )
    evaluate = RunEvaluation(run, thorough, lambda text: print(f"evaluating {text}", file=sys.stderr, flush=True))
    settings = {**config["evaluate"], **node}
    out = run_dir / _file_name(saved, config) if given is None else given
    _check_out(out, settings, replaces_any=given is not None)
    with torch_threads(setup.federation.server_threads):  # as in the run: part of the result
        results = evaluate()
    results = {
        "run": str(run_dir),
        **{key: summary[key] for key in ("strategy", "seed", "rounds", "report_family")},
        "data": setup.evaluator.test.name,
        "image_size": config["data"]["image_size"],
        "settings": settings,
        **results,
        "seconds": time.monotonic() - started,
    }
    replaced = out.exists()
    write_json(out, results)
    _print(results)
    print(f"\n{duration(results['seconds'])}; {'replaced' if replaced else 'wrote'} {out}", flush=True)


def _completed(run_dir: Path) -> "Run":
    """The run, which must have completed."""
    from fedssl.report.runs import read_run

    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"{run_dir} is no run directory: it has no config.yaml. Name one that fedssl has made.")
    run = read_run(run_dir)
    if "federation" not in run.config or "evaluate" not in run.config:
        raise ConfigError(f"{run_dir / 'config.yaml'} is not the configuration of a run that fedssl has made.")
    if not run.completed:
        raise ConfigError(
            f"the run in {run_dir} is {run.status}, and only a completed one has models to evaluate: "
            f"go on with it by fedssl resume={run_dir}"
        )
    return run


def _file_name(saved: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """`evaluation.json` on the run's own labelled data, otherwise named after the data."""
    data = config["evaluate"]["data"]
    if data == saved["evaluate"]["data"]:
        return "evaluation.json"
    return f"evaluation-{data or saved['data']['name']}.json"


def _check_store(saved: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    store = config["client"].get("store")
    if store not in (None, saved["client"].get("store")) and not Path(store).expanduser().is_dir():
        raise ConfigError(
            f"client.store={store} is no folder: name the one where the memory of the run's clients is now."
        )


def _check_out(out: Path, settings: Mapping[str, Any], *, replaces_any: bool) -> None:
    """Before minutes of work: that `out` can be written, and that nothing is replaced which its owner may want."""
    if out.is_dir():
        raise ConfigError(f"{out} is a folder: give -o the name of a file, e.g. {out / 'evaluation.json'}.")
    if out.exists():
        before = _settings_of(out)
        if before is None:
            raise ConfigError(f"{out} is no file that fedssl-evaluate has made, and stays: give -o another name.")
        if not replaces_any and (changes := _changes(before, settings)):
            raise ConfigError(
                f"{out} was made with other settings ({', '.join(changes)}). Keep it by -o FILE with another name; "
                f"-o {out} replaces it."
            )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise ConfigError(f"{out.parent} cannot be written: {error.strerror or error}.") from error


def _settings_of(path: Path) -> dict[str, Any] | None:
    """What an evaluation was made with; None for any other file."""
    try:
        found = json.loads(path.read_text())
        settings = found["settings"] if "rows" in found else None
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return settings if isinstance(settings, dict) else None


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings that differ, each with its value in the file and now; the file may be older than a setting."""
    from fedssl.settings import flatten

    old, new = flatten(before), flatten(json.loads(json.dumps(now)))
    return [
        f"evaluate.{key} was {_value(old, key)}, now {_value(new, key)}"
        for key in old
        if _value(old, key) != _value(new, key)
    ]


def _value(settings: Mapping[str, Any], key: str) -> str:
    return json.dumps(settings[key]) if key in settings else "unset"


# --- the table ---------------------------------------------------------------------------------------------------
def _print(results: Mapping[str, Any]) -> None:
    """One block a family: every figure with its spread, beside the controls'."""
    labelled = ", ".join(f"{name} {count}" for name, count in results["labelled_images"].items())
    print(f"{results['strategy']}, seed {results['seed']}, on {results['data']} ({results['test_images']} images)")
    print(f"labelled images: {labelled}")
    of_family = {(row["model"], row["family"]): row["metrics"] for row in results["rows"] if row["partition"] is None}
    for family in dict.fromkeys(row["family"] for row in results["rows"] if row["family"] is not None):
        columns = {
            title: of_family[key]
            for title, key in {
                "global": ("global", family),
                "clients' own": ("clients", family),
                "random init": ("random_init", family),
                "raw pixels": ("raw_pixels", None),
            }.items()
            if key in of_family
        }
        print(f"\n{family}{' (report family)' if family == results['report_family'] else ''}")
        names = dict.fromkeys(name for metrics in columns.values() for name in metrics)
        lines = [["", *columns]]
        for name in (name for name in names if not name.endswith(("_std", "_min", "_max"))):
            lines.append([name, *(_figure(metrics, name) for metrics in columns.values())])
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        for head, *cells in lines:
            right = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
            print(f"  {head.ljust(widths[0])}  {right}".rstrip())
    if results["absent"]:
        print()
    for name, reason in results["absent"].items():
        print(f"without {name}: {reason}")


def _figure(metrics: Mapping[str, float], name: str) -> str:
    if name not in metrics:
        return ""
    text = f"{metrics[name]:.3f}"
    if f"{name}_std" in metrics:
        text += f" ± {metrics[f'{name}_std']:.3f}"
    if f"{name}_min" in metrics:
        text += f" ({metrics[f'{name}_min']:.3f} to {metrics[f'{name}_max']:.3f})"
    return text


if __name__ == "__main__":
    sys.exit(main())
