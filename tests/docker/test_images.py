"""The images and the compose file fit together, and hadolint finds nothing in them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vllm_kvcompress.engine.refusals import SUPPORTED_VLLM

DOCKER = Path(__file__).parents[2] / "docker"
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which(
    "hadolint"
)


@pytest.fixture(scope="module")
def services():
    return load("compose.yaml")["services"]


def load(path):
    return yaml.safe_load((DOCKER / path).read_text())


@pytest.mark.skipif(HADOLINT is None, reason="no hadolint here")
@pytest.mark.parametrize("dockerfile", sorted(DOCKER.glob("Dockerfile*")), ids=lambda p: p.name)
def test_hadolint_finds_nothing(dockerfile):
    ran = subprocess.run([HADOLINT, dockerfile], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout


def test_the_gpu_image_has_the_supported_vllm():
    (base,) = [line for line in lines("Dockerfile") if line.startswith("FROM")]
    assert base.startswith(f"FROM vllm/vllm-openai:v{SUPPORTED_VLLM}.")


def test_all_images_are_pinned(services):
    images = lines("Dockerfile") + lines("Dockerfile.cpu")
    bases = [line.split()[1] for line in images if line.startswith("FROM")]
    pulled = [service["image"] for service in services.values() if "build" not in service]
    for image in bases + pulled:
        assert ":" in image and not image.endswith(":latest")


def test_what_is_built_and_mounted_exists(services):
    named = set(load("compose.yaml")["volumes"])
    for service in services.values():
        if build := service.get("build"):
            assert (DOCKER / build["context"] / build["dockerfile"]).is_file()
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (DOCKER / source).exists() if source.startswith(".") else source in named


def test_a_gpu_server_keeps_models_and_kernels_and_has_time_to_fetch_them(services):
    server = services["server-gpu"]
    assert "cache:/root/.cache" in server["volumes"], "Hugging Face's and the kernels' folder"
    assert "HF_TOKEN" in server["environment"] and server["ipc"] == "host"
    assert server["healthcheck"]["test"] == services["server"]["healthcheck"]["test"]
    assert server["healthcheck"]["start_period"].endswith("h")
    (argument,) = server["build"]["args"]
    assert any(line.startswith(f"ARG {argument}=") for line in lines("Dockerfile"))


def test_no_port_is_open_to_other_machines(services):
    for service in services.values():
        for port in service["ports"]:
            assert port.startswith("127.0.0.1:")


def test_prometheus_scrapes_the_server_and_grafana_asks_prometheus(services):
    (job,) = load("prometheus.yaml")["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    host, port = target.split(":")
    assert host in services and host in services["server-gpu"]["networks"]["default"]["aliases"]
    assert services["server"]["ports"][0].endswith(f":{port}")
    (source,) = load("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in services
    board = json.loads((DOCKER / "grafana/dashboards/kv-compress.json").read_text())
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {source["uid"]}


def test_the_dashboard_is_provisioned_where_it_is_mounted(services):
    (provider,) = load("grafana/provisioning/dashboards/kv-compress.yaml")["providers"]
    grafana = services["grafana"]
    mounts = dict(volume.split(":")[:2] for volume in grafana["volumes"])
    assert mounts["./grafana/dashboards"] == provider["options"]["path"]
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert str(home.parent) == provider["options"]["path"]
    assert (DOCKER / "grafana/dashboards" / home.name).is_file()


def lines(name):
    return (DOCKER / name).read_text().splitlines()
