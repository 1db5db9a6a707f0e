"""The schema of a RayJob and of the pods in it, for those fields that rayjob.yaml could use.

Names, types, required fields and values are those of KubeRay 1.6's custom resource definition `rayjobs.ray.io`, version
v1, and of Kubernetes' core v1; a field that is not here is refused. KubeRay's own has 1.2 MB.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]
STRING: Schema = {"type": "string"}
TRUTH: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
STRINGS: Schema = {"type": "object", "additionalProperties": STRING}
QUANTITY: Schema = {
    "anyOf": [{"type": "integer"}, {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"}]
}
QUANTITIES: Schema = {"type": "object", "additionalProperties": QUANTITY}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


def of(required: str = "", **properties: Schema) -> Schema:
    """An object with these properties only."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def several(schema: Schema) -> Schema:
    return {"type": "array", "items": schema}


METADATA = of(name=STRING, namespace=STRING, labels=STRINGS, annotations=STRINGS)
RESOURCES = of(limits=QUANTITIES, requests=QUANTITIES)
SECURITY = of(
    allowPrivilegeEscalation=TRUTH,
    capabilities=of(add=several(STRING), drop=several(STRING)),
    privileged=TRUTH,
    readOnlyRootFilesystem=TRUTH,
    runAsGroup=COUNT,
    runAsNonRoot=TRUTH,
    runAsUser=COUNT,
    seccompProfile=of("type", type=one_of("Localhost", "RuntimeDefault", "Unconfined"), localhostProfile=STRING),
)
KEY = of("key", key=STRING, name=STRING, optional=TRUTH)
ENVIRONMENT = several(of("name", name=STRING, value=STRING, valueFrom=of(secretKeyRef=KEY, configMapKeyRef=KEY)))
MOUNTS = several(of("name mountPath", name=STRING, mountPath=STRING, readOnly=TRUTH, subPath=STRING))
CONTAINER = of(
    "name",
    name=STRING,
    image=STRING,
    imagePullPolicy=one_of("Always", "IfNotPresent", "Never"),
    command=several(STRING),
    args=several(STRING),
    env=ENVIRONMENT,
    workingDir=STRING,
    resources=RESOURCES,
    securityContext=SECURITY,
    volumeMounts=MOUNTS,
)
TOLERATION = of(
    key=STRING,
    operator=one_of("Exists", "Equal"),
    value=STRING,
    effect=one_of("NoSchedule", "PreferNoSchedule", "NoExecute"),
    tolerationSeconds=COUNT,
)
VOLUME = of("name", name=STRING, emptyDir=of(medium=STRING, sizeLimit=QUANTITY), secret=of(secretName=STRING))
POD = of(
    metadata=METADATA,
    spec=of(
        "containers",
        automountServiceAccountToken=TRUTH,
        containers={**several(CONTAINER), "minItems": 1},
        initContainers=several(CONTAINER),
        nodeSelector=STRINGS,
        restartPolicy=one_of("Always", "OnFailure", "Never"),
        serviceAccountName=STRING,
        tolerations=several(TOLERATION),
        volumes=several(VOLUME),
    ),
)
HEAD = of(
    "rayStartParams template",
    enableIngress=TRUTH,
    rayStartParams=STRINGS,
    serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"),
    template=POD,
)
WORKERS = of(
    "groupName minReplicas maxReplicas rayStartParams template",
    groupName=STRING,
    idleTimeoutSeconds=COUNT,
    maxReplicas=COUNT,
    minReplicas=COUNT,
    numOfHosts=COUNT,
    rayStartParams=STRINGS,
    replicas=COUNT,
    template=POD,
)
AUTOSCALER = of(
    env=ENVIRONMENT,
    idleTimeoutSeconds=COUNT,
    image=STRING,
    imagePullPolicy=STRING,
    resources=RESOURCES,
    securityContext=SECURITY,
    upscalingMode=one_of("Default", "Aggressive", "Conservative"),
    volumeMounts=MOUNTS,
)
CLUSTER = of(
    "headGroupSpec",
    authOptions=of(mode=one_of("disabled", "token"), secretName=STRING),
    autoscalerOptions=AUTOSCALER,
    enableInTreeAutoscaling=TRUTH,
    headGroupSpec=HEAD,
    headServiceAnnotations=STRINGS,
    rayVersion=STRING,
    suspend=TRUTH,
    workerGroupSpecs=several(WORKERS),
)
RAYJOB = of(
    "apiVersion kind metadata spec",
    apiVersion=one_of("ray.io/v1"),
    kind=one_of("RayJob"),
    metadata=METADATA,
    spec=of(
        activeDeadlineSeconds=COUNT,
        backoffLimit=COUNT,
        clusterSelector=STRINGS,
        entrypoint=STRING,
        entrypointNumCpus={"type": "number"},
        entrypointNumGpus={"type": "number"},
        entrypointResources=STRING,
        jobId=STRING,
        metadata=STRINGS,
        rayClusterSpec=CLUSTER,
        runtimeEnvYAML=STRING,
        shutdownAfterJobFinishes=TRUTH,
        submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
        submitterConfig=of(backoffLimit=COUNT),
        submitterPodTemplate=POD,
        suspend=TRUTH,
        ttlSecondsAfterFinished=COUNT,
    ),
)
