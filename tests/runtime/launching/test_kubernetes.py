"""Manifests: valid for Kubernetes' own schemas, what kubectl makes of them, and what launch makes of them.

There is no cluster here. What would be applied is caught by a stand-in for kubectl.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from headsearch import __version__
from headsearch.cli.app import run
from headsearch.runtime.launching import kubernetes, kustomize
from headsearch.runtime.launching.engines import Wanted
from headsearch.runtime.launching.supervisor import DRAINED
from headsearch.search import studies
from headsearch.spec import StudySpec

OVERLAYS = ["cpu", "gpu", "spot"]
KINDS = ["Job", "PodDisruptionBudget", "NetworkPolicy"]
VERSIONS = kubernetes_validate.utils.all_versions()[-3:]
SPEC = StudySpec.model_validate(
    {
        "name": "my.study_2",
        "budget": {"trials": 6, "epochs": 4},
        "base": {"data": {"name": "digits"}},
        "space": {"head.projection_dim": [2, 4, 8, 16, 32, 64]},
        "worker": {"drain_seconds": 200.5, "checkpoint_store": "s3://bucket/prefix"},
    }
)
WANTED = Wanted(
    workers=5, cpus=3, memory_gb=6.5, image="registry.lab:5000/headsearch@sha256:abc", namespace="vision",
    claim="lab-disk",
)  # fmt: skip
STAND_IN = """#!/bin/sh
printf '%s\\n' "$*" >> "$KUBECTL_SAID"
case "$1" in
config) echo lab-cluster ;;
apply)
    cat > "$KUBECTL_SAID.stdin"
    if [ -n "$KUBECTL_FAILS" ]; then echo "$KUBECTL_FAILS" >&2; exit 1; fi
    echo job.batch/x created ;;
esac
"""


def one(documents, kind):
    (found,) = [document for document in documents if document["kind"] == kind]
    return found


def pod(documents):
    return one(documents, "Job")["spec"]["template"]["spec"]


def launched(overlay="cpu", wanted=WANTED, spec=SPEC):
    return kustomize.patched(kustomize.read_overlay(overlay), kubernetes.patches(spec, wanted))


def validate(documents):
    for version in VERSIONS:
        for document in documents:
            kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_fits_the_schemas_of_current_kubernetes(overlay):
    for documents in (
        kustomize.read_overlay(overlay),
        launched(overlay),
        launched(overlay, Wanted(workers=1)),
    ):
        assert [document["kind"] for document in documents] == KINDS
        validate(documents)


def test_the_schemas_are_strict():
    """Or a misspelt field would pass."""
    documents = launched()
    pod(documents)["securityContext"]["runAsNonRoot "] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(documents)


def test_all_overlays_are_tested():
    assert kustomize.overlays() == OVERLAYS


@pytest.mark.skipif(not shutil.which("kubectl"), reason="no kubectl, whose kustomize is compared with")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_makes_the_same_of_an_overlay_and_of_our_patches(overlay, tmp_path):
    def kubectl(folder):
        done = subprocess.run(
            ["kubectl", "kustomize", "--load-restrictor", "LoadRestrictionsNone", str(folder)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return {document["kind"]: document for document in yaml.safe_load_all(done.stdout)}

    ours = {document["kind"]: document for document in kustomize.read_overlay(overlay)}
    place = kustomize.folder() / "overlays" / overlay
    assert kubectl(place) == ours
    # Once more as an overlay of our own above it, with the patches of a launch.
    root = tmp_path / "kubernetes"
    shutil.copytree(kustomize.folder(), root)
    mine = root / "overlays" / "mine"
    mine.mkdir()
    entries = []
    for kind, operations in kubernetes.patches(SPEC, WANTED).items():
        (mine / f"{kind}.yaml").write_text(yaml.safe_dump(operations))
        entries.append({"path": f"{kind}.yaml", "target": {"kind": kind}})
    (mine / "kustomization.yaml").write_text(
        yaml.safe_dump(
            {
                "apiVersion": "kustomize.config.k8s.io/v1beta1",
                "kind": "Kustomization",
                "resources": [f"../{overlay}"],
                "patches": entries,
            }
        )
    )
    assert kubectl(mine) == {document["kind"]: document for document in launched(overlay)}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_pod_may_do_no_more_than_it_must(overlay):
    spec = pod(launched(overlay))
    assert spec["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC", "serviceAccountName"} & spec.keys()
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = spec["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "privileged": False,
        "capabilities": {"drop": ["ALL"]},
    }
    written = {mount["name"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert written == {"home", "temporary"}
    assert not [volume for volume in spec["volumes"] if "hostPath" in volume]
    assert {"memory", "ephemeral-storage"} <= container["resources"]["limits"].keys()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_secrets_are_files_and_never_variables(overlay):
    spec = pod(launched(overlay))
    (container,) = spec["containers"]
    assert "envFrom" not in container
    assert all(set(variable) == {"name", "value"} for variable in container["env"])
    paths = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    secrets = {volume["name"]: volume["secret"] for volume in spec["volumes"] if "secret" in volume}
    assert {name: secret["secretName"] for name, secret in secrets.items()} == {
        "database": "headsearch-database",
        "s3": "headsearch-s3",
    }
    assert {secret["defaultMode"] for secret in secrets.values()} == {0o440}
    values = {variable["name"]: variable["value"] for variable in container["env"]}
    assert values["HEADSEARCH_DATABASE_URL_FILE"] == f"{paths['database']}/url"
    assert not [name for name in values if re.search("PASSWORD|SECRET|DATABASE_URL$|ACCESS_KEY", name)]


def test_gpu_overlays_ask_for_one_gpu_a_pod_and_cpu_for_none():
    for overlay in OVERLAYS:
        (container,) = pod(launched(overlay))["containers"]
        gpus = container["resources"]["limits"].get("nvidia.com/gpu")
        assert (gpus, container["args"][3:5]) == (
            (None, ["--device", "cpu"]) if overlay == "cpu" else (1, ["--device", "cuda"])
        )
    terms = pod(launched("spot"))["affinity"]["nodeAffinity"]
    assert terms["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    taints = {toleration["key"] for toleration in pod(launched("spot"))["tolerations"]}
    assert {"nvidia.com/gpu", "cloud.google.com/gke-spot", "node.kubernetes.io/unreachable"} <= taints


def test_what_a_launch_sets():
    documents = launched()
    job = one(documents, "Job")
    name = kubernetes.job_name("my.study_2")
    assert {document["metadata"]["name"] for document in documents} == {name}
    assert {document["metadata"]["namespace"] for document in documents} == {"vision"}
    assert job["spec"]["parallelism"] == 5
    assert "completions" not in job["spec"], (
        "the first worker that exits with 0 says that the study has ended"
    )
    spec = pod(documents)
    (container,) = spec["containers"]
    assert " ".join([*container["command"], *container["args"]]) == (
        "headsearch worker --study my.study_2 --device cpu --threads 3 --drained-exit-code 143"
    )
    assert container["image"] == WANTED.image
    assert container["resources"]["requests"]["cpu"] == "3"
    assert {part["memory"] for part in container["resources"].values()} == {"6656Mi"}
    assert {"name": "OMP_NUM_THREADS", "value": "3"} in container["env"]
    assert spec["volumes"][0] == {"name": "home", "persistentVolumeClaim": {"claimName": "lab-disk"}}
    assert spec["terminationGracePeriodSeconds"] == 261
    labels = job["spec"]["template"]["metadata"]["labels"]
    assert labels["app.kubernetes.io/instance"] == name
    assert one(documents, "PodDisruptionBudget")["spec"] == {
        "minAvailable": 4,
        "selector": {"matchLabels": labels},
    }
    assert one(documents, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"] == labels


def test_disruptions_are_no_deaths_and_wrong_input_is_not_tried_again():
    rules = one(launched(), "Job")["spec"]["podFailurePolicy"]["rules"]
    assert [rule["action"] for rule in rules] == ["Ignore", "Ignore", "FailJob"]
    assert rules[0]["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert rules[1]["onExitCodes"]["values"] == [DRAINED]
    assert str(DRAINED) in pod(launched())["containers"][0]["args"]
    assert rules[2]["onExitCodes"]["values"] == [2]
    assert pod(launched())["restartPolicy"] == "Never", "the policy needs it"


def test_the_manifests_as_they_stand_are_those_of_this_version_and_its_defaults():
    spec = pod(kustomize.read_overlay("cpu"))
    assert spec["containers"][0]["image"] == f"headsearch:{__version__}"
    plain = SPEC.model_dump(mode="json") | {"name": "quickstart", "worker": {}}
    assert spec["terminationGracePeriodSeconds"] == kubernetes.grace_seconds(StudySpec.model_validate(plain))


@pytest.mark.parametrize(
    "study", ["a", "my-study", "my.study", "my_study", "x" * 63, "a-" * 31, "9", "a.b", "a-b"]
)
def test_names_are_what_kubernetes_takes(study):
    name = kubernetes.job_name(study)
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name)
    assert len(name) <= 52


def test_names_do_not_meet():
    studies = ["my-study", "my.study", "my_study", "my-study-", "my..study", "x" * 63, "x" * 62]
    assert len({kubernetes.job_name(study) for study in studies}) == len(studies)


@pytest.fixture
def kubectl(tmp_path, monkeypatch):
    """A stand-in for kubectl that notes its words and what it is given to apply."""
    program = tmp_path / "bin" / "kubectl"
    program.parent.mkdir()
    program.write_text(STAND_IN)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.setenv("KUBECTL_SAID", str(tmp_path / "said"))
    monkeypatch.delenv("KUBECTL_FAILS", raising=False)
    return tmp_path / "said"


def lines_of(capsys):
    said = capsys.readouterr()
    return said.out.splitlines(), said.err.strip().splitlines()


@pytest.mark.postgres
def test_launch_says_what_it_does_makes_the_study_and_applies_it_all(database, kubectl, capsys):
    words = [
        "launch",
        "quickstart",
        "--on",
        "kubernetes",
        "--workers",
        "3",
        "--overlay",
        "gpu",
        "--namespace",
        "vision",
    ]
    assert run([*words, "--image", "registry.lab/headsearch:1"]) == 0
    out, err = lines_of(capsys)
    assert err == []
    assert any(
        "3 pods of Job headsearch-quickstart, overlay gpu, image registry.lab/headsearch:1" in line
        for line in out
    )
    assert any("lab-cluster, namespace vision" in line for line in out)
    assert any("trained again from epoch 1" in line for line in out), "there is no disk that pods share"
    assert "job.batch/x created" in out
    assert kubectl.read_text().splitlines() == [
        "config current-context",
        "apply --namespace vision --filename -",
    ]
    applied = list(yaml.safe_load_all(Path(f"{kubectl}.stdin").read_text()))
    assert [document["kind"] for document in applied] == KINDS
    validate(applied)
    assert studies.get(database, "quickstart").state == "open"


@pytest.mark.postgres
def test_an_answer_of_kubectl_is_one_line(database, kubectl, capsys, monkeypatch):
    monkeypatch.setenv("KUBECTL_FAILS", "The Job is invalid:\n field is immutable")
    assert run(["launch", "quickstart", "--on", "kubernetes", "--workers", "3"]) == 1
    _, err = lines_of(capsys)
    assert len(err) == 1
    assert "field is immutable" in err[0]
    assert "delete the Job" in err[0]


def test_a_dry_run_prints_manifests_that_can_be_applied_and_needs_nothing(
    headsearch_home, capsys, monkeypatch
):
    monkeypatch.setenv("PATH", "/nowhere")
    assert run(["launch", "quickstart", "--on", "kubernetes", "--workers", "3", "--dry-run"]) == 0
    out, err = lines_of(capsys)
    assert err == []
    documents = list(yaml.safe_load_all("\n".join(out)))
    assert [document["kind"] for document in documents] == KINDS
    assert any(line.startswith("# workers ") for line in out)
    assert [path.name for path in headsearch_home.iterdir() if path.name != "postgres"] == []


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--workers", "2", "--overlay", "tpu"], ["--overlay", "'tpu'", "cpu, gpu, spot"]),
        (["--workers", "2", "--image", "no image"], ["--image", "registry.lab/headsearch"]),
        (["--workers", "2", "--namespace", "No"], ["--namespace", "'No'"]),
        (["--workers", "2", "--claim", "a/b"], ["--claim", "'a/b'"]),
        (["--workers", "2", "--gpus", "1"], ["--gpus", "slurm"]),
        (["--workers", "2"], ["HEADSEARCH_DATABASE_URL", "embedded server"]),
        ([], ["--workers", "pods"]),
    ],
)
def test_bad_input_is_one_line(words, parts, headsearch_home, kubectl, capsys):
    assert run(["launch", "quickstart", "--on", "kubernetes", *words]) == 2
    out, err = lines_of(capsys)
    assert (out, len(err)) == ([], 1)
    assert [part for part in parts if part not in err[0]] == []
    assert not kubectl.exists()


def test_no_kubectl_is_one_line(headsearch_home, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert run(["launch", "quickstart", "--on", "kubernetes", "--workers", "2"]) == 1
    _, err = lines_of(capsys)
    assert len(err) == 1
    assert "kubectl" in err[0]
    assert "--dry-run" in err[0]
