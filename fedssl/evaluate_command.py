"""The command `fedssl-evaluate`: everything that can be measured of a finished run.

Exit codes: 0 done; 2 bad input; 1 a bug, or weights that are of no use; 130 interrupted, and nothing written. It lies
beside the package `fedssl.evaluate`, as that imports torch, which --help need not wait for.
"""

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedssl.config import EVALUATION_NAME, compose_evaluation, conf_dir, instantiate
from fedssl.errors import ConfigError, FedSSLError

OK, BUG, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

DESCRIPTION = """\
Measure the models of a finished run, beside the same networks before training, and write RUN/evaluation.json:
kNN and linear probes, the linear probe and fine-tuning with 1 % and 10 % of the labels, each client's own mix of
classes, alignment, uniformity, ranks, instance discrimination and linear CKA. Nothing of the run is changed."""

EXAMPLES = """\
fedssl-evaluate runs/flesd                                  everything, with the run's own labelled data
fedssl-evaluate runs/flesd evaluate.data=cifar100 evaluate.root=data
                                                            transfer: another data set, at the run's image size;
                                                            goes to RUN/evaluation-cifar100.json
fedssl-evaluate runs/flesd evaluate.finetune.shares=[]      without fine-tuning, which takes most of the time

Overrides are evaluate.<key>=..., device=auto|cpu|cuda and data.root=DIR. The keys are those of evaluate in the run's
config.yaml (data, root, raw_pixels, batch_size, knn, linear, labels, logistic) and:

"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    sys.path.append(str(Path.cwd()))  # a user's own modules, as `fedssl` finds them
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in `fedssl`, and before torch is imported
    arguments = _parser().parse_intermixed_args(argv)
    try:
        _evaluate(arguments.run, arguments.overrides, arguments.config_dir)
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
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="a folder with YAML files of your own")
    return parser


def _evaluate(run_dir: Path, overrides: Sequence[str], config_dir: Path | None) -> None:
    from fedssl.federation.evaluation import FinishedRun, evaluate_run  # Flower: not for --help
    from fedssl.federation.grids.in_process import torch_threads
    from fedssl.federation.setup import Setup
    from fedssl.federation.simulation import store_root
    from fedssl.federation.store import ClientStore
    from fedssl.tracking import duration, write_json

    started = time.monotonic()
    saved, summary = _completed(run_dir)
    config, node = compose_evaluation(saved, overrides, config_dir=config_dir)
    thorough = instantiate(node)
    out = run_dir / _file_name(saved, config)
    _check_writable(run_dir)
    setup = Setup(config, run_dir)
    run = FinishedRun(
        setup=setup,
        run_dir=run_dir,
        store=ClientStore(store_root(config, run_dir), writable=False),
        rounds=int(summary["rounds"]),
    )
    with torch_threads(setup.federation.server_threads):  # as in the run: part of the result
        results = evaluate_run(run, thorough, lambda text: print(f"evaluating {text}", file=sys.stderr, flush=True))
    results = {
        "run": str(run_dir),
        **{key: summary[key] for key in ("strategy", "seed", "rounds", "report_family")},
        "data": setup.evaluator.test.name,
        "image_size": config["data"]["image_size"],
        "settings": {**config["evaluate"], **node},
        **results,
        "seconds": time.monotonic() - started,
    }
    replaced = out.exists()
    write_json(out, results)
    _print(results)
    print(f"\n{duration(results['seconds'])}; {'replaced' if replaced else 'wrote'} {out}", flush=True)


def _completed(run_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configuration and summary of the run, which must have completed."""
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
    return run.config, run.summary


def _file_name(saved: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """`evaluation.json` on the run's own labelled data, otherwise named after the data."""
    data = config["evaluate"]["data"]
    if data == saved["evaluate"]["data"]:
        return "evaluation.json"
    return f"evaluation-{data or saved['data']['name']}.json"


def _check_writable(run_dir: Path) -> None:
    """Before minutes of work."""
    try:
        with tempfile.TemporaryFile(dir=run_dir):
            pass
    except OSError as error:
        raise ConfigError(f"{run_dir} cannot be written: {error.strerror or error}.") from error


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
