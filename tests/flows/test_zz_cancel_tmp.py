import time, json
from tests.flows.conftest import *
from tests.flows.test_task_runners import *
from prefect.states import Cancelling
def test_cancel(reference, make_vertex_world, make_dask, process_worker, tmp_path):
    world = make_vertex_world(job_seconds=60.0)
    cluster = make_dask(world)
    cluster.worker(), cluster.worker()
    config = {"input_dir": str(reference.inputs), "output_dir": str(tmp_path / "out"), "model2": Q, "responses_per_job": 7,
        "backend": {"name": "vertex_batch", "poll_interval_s": 0.2, "on_cancel": "cancel"},
        "task_runner": {"kind": "dask", "address": cluster.address}}
    run_id = process_worker.start(process_worker.deploy("on-dask", config, world.environment()))
    wait_for(lambda: len(world.jobs) >= 4)
    time.sleep(2)
    t = time.time()
    with process_worker.client as client:
        client.set_flow_run_state(run_id, Cancelling(), force=False)
    run = process_worker.wait(run_id, timeout_s=200)
    print("STATE", run.state.name, round(time.time() - t, 1))
    n = len(world.jobs); time.sleep(5)
    print("JOBS", n, len(world.jobs), {j.state for j in world.jobs})
    print(process_worker.logs(run_id)[-1500:])
    from distributed import Client
    with Client(cluster.address, set_as_default=False) as cl:
        print(cl.run(eval, "[t.name for t in __import__('threading').enumerate()]"))
    assert 0
