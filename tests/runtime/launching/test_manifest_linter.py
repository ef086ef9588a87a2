"""checkov's rules for Kubernetes, all of them but those that are named here with a reason."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
from test_kubernetes import OVERLAYS, launched

from headsearch.runtime.launching import kustomize

EXCEPTIONS = {
    "CKV_K8S_11": "no CPU limit: a worker on an idle node may take what nobody else asks for; its request holds",
    "CKV_K8S_15": "IfNotPresent: an image that is pinned or loaded into the nodes need not be pulled again",
    "CKV_K8S_21": "no namespace in the manifests: they go to the context's, or to --namespace",
    "CKV_K8S_43": "the image is a lab's own; --image NAME@sha256:... pins it",
}


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("checkov"), reason="no checkov")
def test_checkov_finds_nothing_but_the_exceptions(tmp_path):
    plain = {f"/{overlay}.yaml": kustomize.read_overlay(overlay) for overlay in OVERLAYS}
    mine = {f"/launched-{overlay}.yaml": launched(overlay) for overlay in OVERLAYS}
    for name, documents in {**plain, **mine}.items():
        (tmp_path / name[1:]).write_text(kustomize.text(documents))
    done = subprocess.run(
        ["checkov", "--framework", "kubernetes", "--skip-download", "--output", "json", "--directory", str(tmp_path)],
        capture_output=True, text=True, check=False, timeout=250,
    )  # fmt: skip
    results = json.loads(done.stdout)
    assert results["summary"]["passed"] > 60 * len({**plain, **mine}), done.stderr[-2000:]
    failed = {(found["file_path"], found["check_id"]) for found in results["results"]["failed_checks"]}
    # An exception that is not needed any more counts too.
    assert {pair for pair in failed if pair[0] in plain} == {
        (file, rule) for file in plain for rule in EXCEPTIONS
    }
    assert {rule for file, rule in failed if file in mine} <= set(EXCEPTIONS)
