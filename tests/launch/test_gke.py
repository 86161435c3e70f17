"""launch/gke/render.py: the manifest against Kubernetes' schema, JobSet's models and the contract of exit statuses."""

import subprocess
import sys

from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
import kubernetes_validate
import pytest
import yaml

from tests import jobs
from tests.docs import pages

RENDER = jobs.ROOT / "launch" / "gke" / "render.py"
COMMAND = ["llmjax", "train", "--config=llama:1B", "--workdir=gs://b/runs/a", "--config.sample.prompts=('a \"b\"',)"]
TPU = ["--name=big", "--image=r/llmjax:1", "--topology=v6e:4x4", "--slices=2"]
HOSTS = ["--name=big", "--image=r/llmjax:1", "--hosts=4", "--gpus=8"]
EVERYTHING = ["--spot", "--queue=tpus", "--claim=texts:/data", "--service-account=trainer", "--max-restarts=3"]


def render(*flags: str, command: list[str] = COMMAND, status: int = 0) -> str:
    arguments = [sys.executable, str(RENDER), *flags, *(["--", *command] if command else [])]
    process = subprocess.run(arguments, capture_output=True, text=True, timeout=120, env=jobs.environment())
    assert process.returncode == status, process.stderr
    return process.stdout if status == 0 else process.stderr


def job_of(manifest: dict) -> dict:
    [replicated] = manifest["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def pod_of(manifest: dict) -> dict:
    return job_of(manifest)["template"]["spec"]


def check(manifest: dict) -> None:
    """Raise where a field is unknown or has a wrong type. JobSet's models alone ignore unknown fields."""
    read = JobsetV1alpha2JobSet.from_dict(manifest)
    assert read is not None and read.to_dict() == manifest
    for replicated in manifest["spec"]["replicatedJobs"]:
        wrapped = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}, **replicated["template"]}
        kubernetes_validate.validate(wrapped, kubernetes_validate.latest_version(), strict=True)


@pytest.fixture(scope="module")
def tpu() -> dict:
    return yaml.safe_load(render(*TPU, *EVERYTHING))


@pytest.fixture(scope="module")
def gpu() -> dict:
    return yaml.safe_load(render(*HOSTS))


def test_manifests_pass_the_schemas(tpu, gpu):
    check(tpu)
    check(gpu)


def test_documented_command_lines_render():
    lines = [words for words in pages.launcher_lines(pages.DOCS / "launch_cloud.md") if "launch/gke/render.py" in words]
    assert lines
    for words in lines:
        start, split = words.index("launch/gke/render.py") + 1, words.index("--")
        check(yaml.safe_load(render(*words[start:split], command=words[split + 1 :])))


def test_the_check_finds_misspelt_and_mistyped_fields(gpu):
    def broken(change) -> dict:
        manifest = yaml.safe_load(yaml.safe_dump(gpu))
        change(manifest)
        return manifest

    for change in (
        lambda manifest: manifest["spec"].update(failurePolicies={}),
        lambda manifest: job_of(manifest).update(backoffLimit="0"),
        lambda manifest: pod_of(manifest)["containers"][0].update(comand=["a"]),
    ):
        with pytest.raises((AssertionError, ValueError, kubernetes_validate.ValidationError)):
            check(broken(change))


def test_a_slice_is_a_job_with_a_pod_for_each_host(tpu):
    [replicated] = tpu["spec"]["replicatedJobs"]
    job = job_of(tpu)
    assert replicated["replicas"] == 2
    assert (job["completionMode"], job["completions"], job["parallelism"], job["backoffLimit"]) == ("Indexed", 4, 4, 0)
    [container] = pod_of(tpu)["containers"]
    assert container["command"] == COMMAND
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"google.com/tpu": 4}
    assert pod_of(tpu)["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert tpu["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "tpus"}
    assert pod_of(tpu)["serviceAccountName"] == "trainer"
    assert container["volumeMounts"] == [{"name": "claim", "mountPath": "/data"}]


def test_a_tpu_pod_gets_no_variable_that_would_hide_its_slice(tpu):
    [container] = pod_of(tpu)["containers"]
    assert [variable["name"] for variable in container["env"]] == ["LLMJAX_INIT_SECONDS"]


def test_exit_statuses_decide_about_restarts(tpu):
    policy = tpu["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 3
    assert policy["rules"] == [
        {"name": "neverRestart", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    rules = job_of(tpu)["podFailurePolicy"]["rules"]
    by_status = {status: rule["action"] for rule in rules[:2] for status in rule["onExitCodes"]["values"]}
    assert by_status == {76: "FailJob", 77: "FailJob", 78: "FailJob", 85: "Ignore"}
    assert rules[2] == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert pod_of(tpu)["restartPolicy"] == "Never"  # podFailurePolicy requires it
    assert pod_of(tpu)["terminationGracePeriodSeconds"] == 120


@pytest.mark.parametrize(
    ("topology", "hosts", "chips"),
    [("v5e:1x1", 1, 1), ("v5e:2x2", 1, 4), ("v6e:2x4", 2, 4), ("v5p:4x4x4", 16, 4), ("v4:2x2x2", 2, 4)],
)
def test_hosts_of_a_topology(topology, hosts, chips):
    manifest = yaml.safe_load(render("--name=a", "--image=i", f"--topology={topology}"))
    assert job_of(manifest)["completions"] == hosts
    assert pod_of(manifest)["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}


def test_hosts_without_tpus_get_the_variables_of_a_job(gpu):
    [container] = pod_of(gpu)["containers"]
    variables = {variable["name"]: variable.get("value", variable.get("valueFrom")) for variable in container["env"]}
    assert variables["LLMJAX_COORDINATOR"] == "big-slice-0-0.big:8482"
    assert variables["LLMJAX_NUM_PROCESSES"] == "4"
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert variables["LLMJAX_PROCESS_ID"] == {"fieldRef": {"fieldPath": index}}
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert "nodeSelector" not in pod_of(gpu) and "annotations" not in gpu["metadata"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([*TPU, "--hosts=2"], "not allowed with argument"),
        (["--name=Big", "--image=i", "--hosts=2"], "'Big' is not a name of up to 40"),
        (["--name=a", "--image=i", "--topology=v6e:4"], "--topology=v6e:4: v6e has 2 axes"),
        (["--name=a", "--image=i", "--topology=cpu:4"], "expected TPUs"),
        ([*TPU, "--gpus=8"], "--gpus=8: a host has TPUs or GPUs"),
        ([*HOSTS, "--slices=2"], "--slices=2: only TPUs have slices"),
        ([*HOSTS, "--claim=texts:data"], "'texts:data' is not NAME:PATH"),
        ([*HOSTS, "--max-restarts=-1"], "'-1' is not an integer"),
    ],
)
def test_bad_flags_are_refused_in_one_line(flags, message):
    error = render(*flags, status=78)
    assert error.startswith("launch/gke/render.py: error: ") and error.count("\n") == 1 and message in error


def test_the_command_is_required():
    assert "the command is missing; put it after --" in render(*HOSTS, command=[], status=78)


def test_help_shows_usage_and_statuses():
    text = render("--help", command=[])
    assert "kubectl apply -f -" in text and "76, 77 and 78 end the JobSet" in text
