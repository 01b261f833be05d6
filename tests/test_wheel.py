"""The installed package, away from the checkout, with a strategy, a backbone and YAML files of a user's own."""

import json
import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.federation_helpers import without_clock

ROOT = Path(__file__).parents[1]

STRATEGY = '''\
"""The last client of each architecture wins."""

from dataclasses import dataclass

import torch
from flwr.app import MetricRecord
from flwr.serverapp.strategy import Strategy

from fedssl.federation.records import Upload, family_state, model_state, to_arrays
from fedssl.federation.server import read_uploads


@dataclass(frozen=True, kw_only=True)
class LastWinsClient:
    local_epochs: int

    def __call__(self, client, broadcast):
        model = client.load(broadcast)
        metrics = client.train(model, epochs=self.local_epochs)
        return client.upload({k: v.numpy() for k, v in model_state(model).items()}, metrics, codec="last")


class LastWins(Strategy):
    def __init__(self, *, server, shrink: float):
        self.server, self.shrink = server, shrink

    def configure_train(self, server_round, arrays, config, grid):
        self.arrays, self.round_num = arrays, server_round
        return self.server.messages(server_round, self.server.sample_cohort(server_round, grid), config, arrays)

    def check(self, reply):
        upload = Upload.from_message(reply)
        self.server.check_header(upload, self.round_num, "last")
        return upload

    def aggregate_train(self, server_round, replies):
        states = {family: family_state(self.arrays, family) for family in self.server.families}
        for upload in read_uploads(replies, self.check):
            arrays = upload.arrays.items()
            states[upload.header.family] = {k: torch.tensor(v) * self.shrink for k, v in arrays}
        return to_arrays(states), MetricRecord()

    def configure_evaluate(self, server_round, arrays, config, grid):
        return []

    def aggregate_evaluate(self, server_round, replies):
        return None

    def summary(self):
        pass
'''

BACKBONE = """\
from torch import nn


class TwoLayers(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(
            nn.Conv2d(3, width, 5, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.LayerNorm(4 * width)
        )
"""

YAML = {
    "strategy/last_wins.yaml": (
        "client:\n  _target_: researcher.strategy.LastWinsClient\n  local_epochs: ${client.local_epochs}\n"
        "server:\n  _target_: researcher.strategy.LastWins\n  shrink: 1\n"
    ),
    "experiment/tiny.yaml": """\
# @package _global_
defaults:
  - override /strategy: last_wins
  - override /partition: iid
models:
  two_layers: {_target_: researcher.backbone.TwoLayers, width: 4}
  conv4_2: {_target_: fedssl.models.backbones.Conv4, width: 2}
device: cpu
data: {num_images: 130}
public: {size: 20}
projector: {out_dim: 8}
federation: {num_clients: 3, num_rounds: 1, families: [two_layers, conv4_2]}
client: {local_epochs: 1, batch_size: 16}
evaluate:
  linear: {l2: [0.01]}
  labels: {per_class: [1], num_draws: 2}
  logistic: {max_iterations: 5}
""",
}


@dataclass(frozen=True, kw_only=True)
class Installed:
    """A wheel in an environment of its own, and a user's project."""

    wheel: Path
    bin: Path
    project: Path

    def call(self, *command: str, folder: Path) -> subprocess.CompletedProcess[str]:
        """A command of the environment, where `project` is importable and the checkout is not."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return subprocess.run(
            [str(self.bin / command[0]), *command[1:]],
            cwd=folder,
            env={**environment, "PYTHONPATH": str(self.project)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Build the wheel from the source distribution, install it; what it depends on comes from this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(ROOT))
    (wheel,) = (folder / "dist").glob("*.whl")
    environment = folder / "environment"
    venv.create(environment, with_pip=True, symlinks=True)
    python = environment / "bin" / "python"
    _run(str(python), "-m", "pip", "install", "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel))
    (site,) = environment.glob("lib/python*/site-packages")
    # Folders that a .pth names go to sys.path; their own .pth files, such as an editable install's, are not read.
    others = [path for path in sys.path if path.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(others) + "\n")
    project = folder / "project"
    for name, text in {"__init__.py": "", "strategy.py": STRATEGY, "backbone.py": BACKBONE}.items():
        _write(project / "researcher" / name, text)
    for name, text in YAML.items():
        _write(project / "conf" / name, text)
    return Installed(wheel=wheel, bin=environment / "bin", project=project)


def _run(*command: str) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_wheel_holds_both_packages_the_configuration_and_the_templates(installed: Installed) -> None:
    held = set(zipfile.ZipFile(installed.wheel).namelist())
    expected = {f"fedssl/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    for package in ("fedssl", "strategies"):
        expected |= {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")}
    expected |= {str(path.relative_to(ROOT)) for path in (ROOT / "fedssl" / "report" / "templates").iterdir()}
    expected |= {f"fedssl/{path.relative_to(ROOT)}" for path in (ROOT / "deploy" / "app").iterdir()}
    assert expected <= held
    strangers = {name for name in held - expected if ".dist-info/" not in name}
    assert all(name.endswith(("/py.typed", "/README.md")) for name in strangers), strangers


def test_the_installed_package_is_the_one_imported(installed: Installed, tmp_path: Path) -> None:
    code = "import fedssl, strategies, fedssl.config as c; print(fedssl.__file__, strategies.__file__, c.conf_dir())"
    ended = installed.call("python", "-c", code, folder=tmp_path)
    assert ended.returncode == 0, ended.stderr
    for path in ended.stdout.split():
        assert Path(path).is_relative_to(installed.bin.parent)


def test_help_lists_the_users_choices_beside_ours(installed: Installed, tmp_path: Path) -> None:
    ended = installed.call("fedssl", "--config-dir", str(installed.project / "conf"), "--help", folder=tmp_path)
    assert ended.returncode == 0, ended.stderr
    (line,) = [line for line in ended.stdout.splitlines() if line.startswith("strategy: ")]
    assert "flesd" in line
    assert "last_wins" in line
    assert list(tmp_path.iterdir()) == []


def test_the_app_that_flower_sends_travels_along(installed: Installed, tmp_path: Path) -> None:
    ended = installed.call("fedssl-deploy", "bundle", "app", "run_dir=run", folder=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "app" / "pyproject.toml").read_text() == (ROOT / "deploy/app/pyproject.toml").read_text()
    assert tomllib.loads((tmp_path / "app-run.toml").read_text()).keys() == {"cfg-json"}


@pytest.fixture(scope="module")
def in_process(installed: Installed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's run in one process, from an empty folder."""
    return _simulate(installed, tmp_path_factory.mktemp("empty"), "grid=in_process")


def _simulate(installed: Installed, folder: Path, *overrides: str) -> Path:
    command = ["fedssl", "--config-dir", str(installed.project / "conf"), "experiment=tiny", "run_dir=run", *overrides]
    ended = installed.call(*command, folder=folder)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "last_wins on digits: completed after 1 rounds" in ended.stdout
    assert [path.name for path in folder.iterdir()] == ["run"]
    return folder / "run"


def test_a_users_strategy_and_backbone_run_in_process(installed: Installed, in_process: Path) -> None:
    summary = json.loads((in_process / "summary.json").read_text())
    assert summary["strategy"] == "last_wins"
    assert set(summary["families"]) == {"two_layers", "conv4_2"}
    assert summary["linear_top1"] > 0.2  # of ten classes: the networks, the images and the labels belong together
    ended = installed.call("fedssl-report", "run", "-o", "report", folder=in_process.parent)
    assert ended.returncode == 0, ended.stderr
    assert "last_wins" in (in_process.parent / "report" / "results.csv").read_text()


@pytest.mark.ray
def test_and_on_ray_with_the_same_figures(installed: Installed, in_process: Path, tmp_path: Path) -> None:
    run_dir = _simulate(installed, tmp_path, "grid=ray", "grid.workers=1")
    ours, theirs = (json.loads((path / "summary.json").read_text()) for path in (run_dir, in_process))
    assert without_clock(ours) == without_clock(theirs)
