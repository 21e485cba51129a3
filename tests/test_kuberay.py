"""deploy/kuberay: KubeRay's own schema accepts the manifests, and they say what kinoray's jobs need.

The schema is the RayJob definition of KubeRay v1.7.0-rc.0, 1.4 MB and not ours, so it is not in this repository: the
tests that need it skip where ../shared/data/kuberay_rayjobs_crd.yaml is absent. Nothing here has been on a cluster.
"""

import copy
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.scripts.scripts import start

import kinoray
from crd_schema import errors_in
from kinoray.cli import VERBS, main
from kinoray.config.file import load_config

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "deploy" / "kuberay"
CRD = ROOT.parent / "shared" / "data" / "kuberay_rayjobs_crd.yaml"
JOBS = ("label", "train", "tune")
UNITS = {"m": 1e-3, "": 1.0, "Mi": 2.0**20, "Gi": 2.0**30}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / f"{name}.yaml").read_text(encoding="utf-8")))


def of_kind(name: str, kind: str) -> dict[str, Any]:
    found = [document for document in documents(name) if document["kind"] == kind]
    assert len(found) == 1
    return found[0]


def cluster_spec(name: str) -> dict[str, Any]:
    """The cluster that the manifest starts."""
    if name == "cluster":
        spec: dict[str, Any] = of_kind(name, "RayCluster")["spec"]
    else:
        spec = of_kind(name, "RayJob")["spec"]["rayClusterSpec"]
    return spec


def groups(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def pods(name: str) -> list[dict[str, Any]]:
    """The spec of every pod that comes of the manifest."""
    found = [group["template"]["spec"] for group in groups(cluster_spec(name))]
    if name in JOBS:
        found.append(of_kind(name, "RayJob")["spec"]["submitterPodTemplate"]["spec"])
    return found


def quantity(text: str) -> float:
    match = re.fullmatch(r"([0-9.]+)(m|Mi|Gi|)", text)
    assert match, text
    return float(match[1]) * UNITS[match[2]]


@pytest.fixture(scope="module")
def rayjob() -> dict[str, Any]:
    """The schema of a RayJob."""
    if not CRD.exists():
        pytest.skip("KubeRay's RayJob definition (kuberay_rayjobs_crd.yaml, v1.7.0-rc.0) is not here")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    versions = yaml.load(CRD.read_text(encoding="utf-8"), Loader=loader)["spec"]["versions"]
    schema: dict[str, Any] = next(item for item in versions if item["name"] == "v1")["schema"]["openAPIV3Schema"]
    return schema


@pytest.mark.parametrize("name", JOBS)
def test_the_schema_of_a_rayjob_allows_every_field(name: str, rayjob: dict[str, Any]) -> None:
    job = of_kind(name, "RayJob")
    assert job["apiVersion"] == "ray.io/v1"
    assert set(job["metadata"]) == {"name", "namespace"}
    metadata = {"metadata": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}  # the API server's own
    assert not errors_in(job, {**rayjob, "properties": {**rayjob["properties"], **metadata}})


def test_the_schema_of_a_cluster_allows_every_field(rayjob: dict[str, Any]) -> None:
    cluster = of_kind("cluster", "RayCluster")
    assert set(cluster) == {"apiVersion", "kind", "metadata", "spec"}
    assert not errors_in(cluster["spec"], rayjob["properties"]["spec"]["properties"]["rayClusterSpec"])


@pytest.mark.parametrize(
    ("place", "key", "value", "message"),
    [
        pytest.param((), "ttlSecondsAfterFinish", 60, ".ttlSecondsAfterFinish: is not a field", id="of the job"),
        pytest.param(("rayClusterSpec", "authOptions"), "Mode", "token", ".Mode: is not a field", id="of the token"),
        pytest.param(("rayClusterSpec", "authOptions"), "mode", "on", "must be one of disabled, token", id="a mode"),
        pytest.param(
            ("rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "resources"),
            "limit",
            {},
            "containers[0].resources.limit: is not a field",
            id="deep in a pod",
        ),
        pytest.param(
            ("rayClusterSpec", "workerGroupSpecs", 0), "maxReplicas", "8", "must be integer, found '8'", id="a number"
        ),
        pytest.param(
            ("rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0, "resources", "limits"),
            "memory",
            "16 GB",
            "'16 GB' does not match",
            id="a quantity",
        ),
        pytest.param((), "deletionStrategy", {}, "only a cluster can check", id="rules"),
    ],
)
def test_a_misspelt_field_is_refused(
    place: tuple[str | int, ...], key: str, value: Any, message: str, rayjob: dict[str, Any]
) -> None:
    spec = copy.deepcopy(of_kind("label", "RayJob")["spec"])
    target: Any = spec
    for step in place:
        target = target[step]
    target[key] = value
    errors = errors_in(spec, rayjob["properties"]["spec"])
    assert len(errors) == 1
    assert message in errors[0]


def test_a_missing_field_is_named(rayjob: dict[str, Any]) -> None:
    spec = copy.deepcopy(of_kind("label", "RayJob")["spec"])
    del spec["rayClusterSpec"]["headGroupSpec"]["template"]
    assert errors_in(spec, rayjob["properties"]["spec"]) == [".rayClusterSpec.headGroupSpec.template: is missing"]


def test_a_schema_that_says_more_than_is_checked_is_an_error() -> None:
    assert "multipleOf, which is not checked here" in errors_in(4, {"type": "integer", "multipleOf": 2})[0]


@pytest.mark.parametrize("verb", JOBS)
def test_the_entrypoint_runs_a_job_that_takes_its_config(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, config = of_kind(verb, "RayJob"), of_kind(verb, "ConfigMap")
    python, script, flag, path = shlex.split(job["spec"]["entrypoint"])
    assert (python, flag) == ("python", "--config")
    assert f"COPY jobs {Path(script).parent}" in (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert (ROOT / "jobs" / Path(script).name).is_file()
    assert f'main(["{verb}"' in (ROOT / "jobs" / Path(script).name).read_text(encoding="utf-8")

    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    mount = next(item for item in head["containers"][0]["volumeMounts"] if item["name"] == "config")
    assert {"name": "config", "configMap": {"name": config["metadata"]["name"]}} in head["volumes"]
    assert Path(path).parent == Path(mount["mountPath"])
    assert list(config["data"]) == [Path(path).name]

    file = tmp_path / Path(path).name
    file.write_text(config["data"][file.name], encoding="utf-8")
    assert main([verb, "--config", str(file), "--print-config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["out"].startswith("s3://")  # not a folder that ends with the pod


@pytest.mark.parametrize("verb", JOBS)
def test_the_job_fits_into_the_nodes_that_it_starts_with(verb: str, tmp_path: Path) -> None:
    """By the rule of kinoray.cluster.connect.require_fit, which looks at the nodes that are there at the start."""
    file = tmp_path / "config.yaml"
    file.write_text(of_kind(verb, "ConfigMap")["data"][f"{verb}.yaml"], encoding="utf-8")
    config = load_config(VERBS[verb].config(), str(file))
    resources = config.resources
    workers = cluster_spec(verb)["workerGroupSpecs"]
    assert all(group["replicas"] == group["minReplicas"] <= group["maxReplicas"] for group in workers)
    limits = [
        (group["minReplicas"], group["template"]["spec"]["containers"][0]["resources"]["limits"]) for group in workers
    ]
    cpus = sum(count * quantity(limit["cpu"]) for count, limit in limits)
    gpus = sum(count * quantity(limit.get("nvidia.com/gpu", "0")) for count, limit in limits)
    decode_cpus = 0 if verb == "label" else resources.decode_tasks  # labelling decodes inside its workers
    assert resources.num_workers * resources.cpus_per_worker + decode_cpus <= cpus
    assert 0 < resources.num_workers * resources.gpus_per_worker <= gpus
    assert resources.cpus_per_worker <= max(quantity(limit["cpu"]) for _, limit in limits if "nvidia.com/gpu" in limit)
    if verb == "tune":
        pod = workers[0]["template"]["spec"]
        assert config.cache.gb * 1e9 < quantity(volume(pod, "tmp")["sizeLimit"])


@pytest.mark.parametrize("verb", JOBS)
def test_a_job_is_taken_up_again_and_leaves_nothing_running(verb: str) -> None:
    spec = of_kind(verb, "RayJob")["spec"]
    assert spec["backoffLimit"] >= 1
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["activeDeadlineSeconds"] > 0


@pytest.mark.parametrize("name", [*JOBS, "cluster"])
def test_the_cluster_is_closed_and_its_head_runs_no_work(name: str) -> None:
    spec = cluster_spec(name)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert "serviceType" not in spec["headGroupSpec"]  # ClusterIP: not from outside
    assert [group["groupName"] for group in spec["workerGroupSpecs"]][-1] == "gpu"


@pytest.mark.parametrize("name", [*JOBS, "cluster"])
def test_every_ray_start_option_is_one_of_ray(name: str) -> None:
    for group in groups(cluster_spec(name)):
        arguments = [f"--{key}={value}" for key, value in group["rayStartParams"].items()]
        start.make_context("start", arguments)  # raises where an option or its value is none
        assert "labels" not in group["rayStartParams"]  # KubeRay takes them from the group, and refuses them here


@pytest.mark.parametrize("name", [*JOBS, "cluster"])
def test_pods_have_no_rights_and_what_they_need(name: str) -> None:
    for pod in pods(name):
        security, [container] = pod["securityContext"], pod["containers"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] > 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"cpu", "memory"} <= set(container["resources"]["limits"]) == set(container["resources"]["requests"])
        assert {mount["name"] for mount in container["volumeMounts"]} == {item["name"] for item in pod["volumes"]}
        assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}  # the root is read-only
        assert {"name": "HOME", "value": "/tmp"} in container["env"]
        assert pod.get("serviceAccountName") == "kinoray-head" or pod["automountServiceAccountToken"] is False
        assert not [item for item in container["env"] if item["name"].startswith("AWS_")]


@pytest.mark.parametrize("name", [*JOBS, "cluster"])
def test_the_object_store_fits_into_shared_memory_and_spills_to_a_disk(name: str) -> None:
    for group in groups(cluster_spec(name)):
        pod, parameters = group["template"]["spec"], group["rayStartParams"]
        [container] = pod["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        shm, spill = volume(pod, "shm"), volume(pod, "spill")
        assert mounts["shm"] == "/dev/shm"
        assert shm["medium"] == "Memory"
        memory = quantity(container["resources"]["limits"]["memory"])
        assert int(parameters["object-store-memory"]) < quantity(shm["sizeLimit"]) < memory / 2
        assert mounts["spill"] == parameters["object-spilling-directory"]
        assert "medium" not in spill
        disks = quantity(spill["sizeLimit"]) + quantity(volume(pod, "tmp")["sizeLimit"])
        assert disks <= quantity(container["resources"]["limits"]["ephemeral-storage"])


SITES = ("eks", "gke", "onprem")


def kustomization(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    return found


def test_the_kustomization_names_files_and_sites_that_are_there_and_the_choices_beside_them() -> None:
    top = kustomization(FOLDER)
    assert top["resources"] == ["access.yaml", "label.yaml"]
    assert top["components"] == ["eks"]
    text = (FOLDER / "kustomization.yaml").read_text(encoding="utf-8")
    chosen = {file.name for file in FOLDER.glob("*.yaml")} - {"kustomization.yaml"}
    assert set(re.findall(r"\w+\.yaml", text.partition("resources:")[2].partition("components:")[0])) == chosen
    assert (
        set(re.findall(r"eks|gke|onprem", text))
        == set(SITES)
        == {path.name for path in FOLDER.iterdir() if path.is_dir()}
    )
    assert {kustomization(FOLDER / site)["kind"] for site in SITES} == {"Component"}


@pytest.mark.parametrize("name", [*JOBS, "cluster"])
def test_every_container_that_reads_the_store_takes_its_address_and_keys(name: str) -> None:
    """What gke/ and onprem/ make, and the Secret that their heads tell of; absent at EKS, where a role is enough."""
    expected = [{kind: {"name": "kinoray-store", "optional": True}} for kind in ("configMapRef", "secretRef")]
    for group in groups(cluster_spec(name)):
        assert [container["envFrom"] for container in group["template"]["spec"]["containers"]] == [expected]
    for site in ("gke", "onprem"):
        text = (FOLDER / site / "kustomization.yaml").read_text(encoding="utf-8")
        assert "create secret generic kinoray-store" in text
        [made] = kustomization(FOLDER / site)["configMapGenerator"]
        assert (made["name"], made["namespace"]) == ("kinoray-store", "kinoray")
        assert made["options"] == {"disableNameSuffixHash": True}  # else it is not the name that pods ask for
        settings = dict(line.split("=", 1) for line in made["literals"])
        assert not set(settings) & {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
        assert settings["AWS_ENDPOINT_URL"].startswith("http")


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which has kustomize in it, is not installed")
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", [*JOBS, "cluster"])
def test_kustomize_puts_image_role_and_store_into_each_job(name: str, site: str, tmp_path: Path) -> None:
    folder = shutil.copytree(FOLDER, tmp_path / "kuberay")
    top = kustomization(folder)
    top |= {"resources": ["access.yaml", f"{name}.yaml"], "components": [site]}
    top["images"][0] |= {"newName": "registry.example.org/team/kinoray", "newTag": "9"}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(top), encoding="utf-8")
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=True, timeout=60)
    rendered = list(yaml.safe_load_all(done.stdout))
    assert set(re.findall(r"image: (\S+)", done.stdout)) == {"registry.example.org/team/kinoray:9"}
    assert done.stdout.count("image: ") == len(pods(name))

    accounts = [item["metadata"] for item in rendered if item["kind"] == "ServiceAccount"]
    roles = {item.get("annotations", {}).get("eks.amazonaws.com/role-arn") for item in accounts}
    assert len(accounts) == 2
    assert roles == ({"arn:aws:iam::000000000000:role/kinoray-bucket"} if site == "eks" else {None})
    stores = [item["data"] for item in rendered if item["metadata"]["name"] == "kinoray-store"]
    assert ["AWS_ENDPOINT_URL" in store for store in stores] == ([] if site == "eks" else [True])

    [workload] = [item for item in rendered if item["apiVersion"] == "ray.io/v1"]
    original = of_kind(name, workload["kind"])["spec"]
    changed = yaml.safe_load(
        yaml.safe_dump(original).replace("example.com/kinoray:0.1.0", "example.org/team/kinoray:9")
    )
    assert workload["spec"] == changed  # and nothing else of it, so what the schema allowed it allows


def volume(pod: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(item for item in pod["volumes"] if item["name"] == name)["emptyDir"]
    return found


def test_accounts_are_those_that_pods_name() -> None:
    accounts = {item["metadata"]["name"]: item for item in documents("access") if item["kind"] == "ServiceAccount"}
    [namespace] = [item for item in documents("access") if item["kind"] == "Namespace"]
    named = {
        pod["serviceAccountName"] for name in (*JOBS, "cluster") for pod in pods(name) if "serviceAccountName" in pod
    }
    assert named == set(accounts)
    assert accounts["kinoray-worker"]["automountServiceAccountToken"] is False
    everything = [item for name in ("access", *JOBS, "cluster") for item in documents(name)]
    namespaces = {item["metadata"]["namespace"] for item in everything if item["kind"] != "Namespace"}
    assert namespaces == {namespace["metadata"]["name"]}


def test_images_and_versions_are_those_of_this_repository() -> None:
    versions = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    )
    images = {
        container["image"] for name in (*JOBS, "cluster") for pod in pods(name) for container in pod["containers"]
    }
    assert images == {f"registry.example.com/kinoray:{kinoray.__version__}"}
    [image] = kustomization(FOLDER)["images"]  # and there is one place to put another one
    assert f"{image['name']}:{image['newTag']}" in images
    assert isinstance(image["newTag"], str)  # a tag such as 2 would be refused as a number
    assert {cluster_spec(name)["rayVersion"] for name in (*JOBS, "cluster")} == {versions["ray"]}
