"""scripts/mpijob.yaml against what the MPI Operator takes.  FIELDS is a table of the fields that the manifest uses,
with their types, and of the operator's own, as its CustomResourceDefinition of release 0.8 has them.  KILN_MPIJOB_CRD
names a file with the whole definition: manifests/base/kubeflow.org_mpijobs.yaml of github.com/kubeflow/mpi-operator."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import REPO

yaml = pytest.importorskip("yaml", reason="no PyYAML (Debian's package python3-yaml)")
MANIFEST = REPO / "scripts" / "mpijob.yaml"
Schema = dict
TYPES = {"string": str, "integer": int, "boolean": bool, "array": list, "object": dict}


def one_of(*names: str) -> Schema:
    return {"type": "string", "enum": names}


def list_of(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def fields(required: str = "", **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": required.split()}


STRING, INTEGER, BOOLEAN = ({"type": t} for t in ("string", "integer", "boolean"))
QUANTITIES = {"type": "object", "additionalProperties": {"x-kubernetes-int-or-string": True}}
CONTAINER = fields(
    "name",
    name=STRING,
    image=STRING,
    workingDir=STRING,
    command=list_of(STRING),
    args=list_of(STRING),
    resources=fields(limits=QUANTITIES, requests=QUANTITIES),
    readinessProbe=fields(tcpSocket=fields("port", port=INTEGER), periodSeconds=INTEGER),
    volumeMounts=list_of(fields("name mountPath", name=STRING, mountPath=STRING, subPath=STRING)),
)
POD = fields(
    "containers",
    containers=list_of(CONTAINER),
    volumes=list_of(fields("name", name=STRING, persistentVolumeClaim=fields("claimName", claimName=STRING))),
)
REPLICAS = fields(replicas=INTEGER, restartPolicy=STRING, template=fields(metadata={"type": "object"}, spec=POD))
FIELDS = fields(
    apiVersion=one_of("kubeflow.org/v2beta1"),
    kind=one_of("MPIJob"),
    metadata={"type": "object"},
    spec=fields(
        "mpiReplicaSpecs",
        launcherCreationPolicy=STRING,
        mpiImplementation=one_of("OpenMPI", "Intel", "MPICH"),
        mpiReplicaSpecs={"type": "object", "additionalProperties": REPLICAS},
        runLauncherAsWorker=BOOLEAN,
        runPolicy=fields(
            activeDeadlineSeconds=INTEGER,
            backoffLimit=INTEGER,
            cleanPodPolicy=STRING,
            managedBy=STRING,
            schedulingPolicy={"type": "object"},
            suspend=BOOLEAN,
            ttlSecondsAfterFinished=INTEGER,
        ),
        slotsPerWorker=INTEGER,
        sshAuthMountPath=STRING,
    ),
)


def violations(value: object, schema: Schema, at: str = "") -> Iterator[str]:
    """By the rules of OpenAPI's schemas; like `kubectl apply --validate=strict` also each unknown field."""
    if schema.get("x-kubernetes-int-or-string"):
        if not isinstance(value, (int, str)):
            yield f"{at}: {value!r} is neither an integer nor a string"
        return
    if type(value) is not TYPES[schema["type"]]:
        yield f"{at}: {value!r} is not of type {schema['type']}"
    elif value not in schema.get("enum", [value]):
        yield f"{at}: {value!r} is none of {schema['enum']}"
    elif isinstance(value, list):
        for i, x in enumerate(value):
            yield from violations(x, schema["items"], f"{at}[{i}]")
    elif isinstance(value, dict):
        yield from (f"{at}.{name} is missing" for name in schema.get("required", []) if name not in value)
        for name, x in value.items():
            known = schema.get("properties", {}).get(name) or schema.get("additionalProperties")
            if known:
                yield from violations(x, known, f"{at}.{name}")
            elif "properties" in schema or "additionalProperties" in schema:
                yield f"{at}.{name} is unknown"


def schemas() -> list[Schema]:
    path = os.environ.get("KILN_MPIJOB_CRD")
    if not path:
        return [FIELDS]
    versions = yaml.safe_load(Path(path).read_text())["spec"]["versions"]
    return [FIELDS, *(v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v2beta1")]


def test_the_operator_takes_the_manifest() -> None:
    job = yaml.safe_load(MANIFEST.read_text())
    for schema in schemas():
        assert list(violations(job, schema)) == []
    # The operator checks these rules itself.
    spec = job["spec"]
    launcher, worker = (spec["mpiReplicaSpecs"][role] for role in ("Launcher", "Worker"))
    assert spec["launcherCreationPolicy"] in ("AtStartup", "WaitForWorkersReady")
    assert spec["runPolicy"]["cleanPodPolicy"] in ("None", "Running", "All")
    assert {launcher["restartPolicy"], worker["restartPolicy"]} <= {"Never", "OnFailure"}
    assert launcher["replicas"] == 1
    # Kiln's own: a rank for each slot, one program at one place, and commands that are there.
    start, serve = (role["template"]["spec"]["containers"][0] for role in (launcher, worker))
    assert start["args"][:2] == ["-np", str(worker["replicas"] * spec["slotsPerWorker"])]
    assert (start["image"], start["workingDir"]) == (serve["image"], serve["workingDir"])
    assert os.access(REPO / start["command"][0], os.X_OK)
    assert (REPO / start["args"][start["args"].index("--config") + 1]).exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("slotsPerWorker: 1", "slotsPerWorker: one", ".spec.slotsPerWorker: 'one' is not of type integer"),
        ("slotsPerWorker", "slotsPerworker", ".spec.slotsPerworker is unknown"),
        ("MPICH", "mpich", ".spec.mpiImplementation: 'mpich' is none of"),
        ("- name: worker", "- title: worker", "Worker.template.spec.containers[0].name is missing"),
    ],
)
def test_a_wrong_field_is_seen(old: str, new: str, message: str) -> None:
    assert old in MANIFEST.read_text()
    for schema in schemas():
        found = list(violations(yaml.safe_load(MANIFEST.read_text().replace(old, new)), schema))
        assert any(message in line for line in found), found
