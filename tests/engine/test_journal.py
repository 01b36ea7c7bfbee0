"""A job that ends early is gone on with, and its file has the bytes of a run that nothing disturbed."""

import errno
import fcntl
import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import frameloom
from frameloom.engine import job, jobs, journal
from frameloom.errors import InternalError, OutputError, RequestError
from frameloom.types import EngineConfig

SIZE = {"width": 64, "height": 32, "num_frames": 9, "steps": 4, "seed": 5}
PROMPT = "a red circle moving left"


class Killed(BaseException):
    """Ends a run where it stands."""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder of jobs of this test alone, which keeps every step."""
    monkeypatch.setenv("FRAMELOOM_JOBS", str(tmp_path / "jobs"))
    monkeypatch.setattr(journal, "_COST", 0)
    return tmp_path / "jobs"


def pictures_of(kind):
    image = Image.linear_gradient("L").resize((64, 32)).convert("RGB")
    video = np.stack([np.asarray(image.rotate(9 * i)) for i in range(9)])
    if kind == "vace":
        return {"control_video": video, "mask": video, "references": [image], "control_strength": 0.5}
    if kind == "one expert":
        return {}
    return {"image": image} | ({"last_image": image.rotate(90)} if "last" in kind else {})


def ends_at(stage, step):
    """A progress callback that ends the run there."""

    def tell(progress):
        if (progress.stage, progress.step) == (stage, step):
            raise Killed

    return tell


def make(engine, path, *, progress=None, **options):
    engine.generate_to(path, PROMPT, job=True, progress=progress, **(SIZE | options))
    return path.read_bytes()


def begun(engine, path, stage, step, **options):
    """The name of a job that ended there."""
    with pytest.raises(Killed):
        make(engine, path, progress=ends_at(stage, step), **options)
    assert not path.exists()
    assert not [left for left in path.parent.iterdir() if "partial" in left.name]
    return frameloom.jobs()[-1]["name"]


MOMENTS = [("text", 0), ("text", 1), ("denoise", 0), ("denoise", 1), ("denoise", 3), ("denoise", 4)]
MOMENTS += [("decode", 0), ("decode", 1), ("decode", 9)]


@pytest.mark.parametrize("kind", ["one expert", "two experts", "per-token timesteps", "first and last image", "vace"])
def test_wherever_a_run_ends_the_resumed_file_has_the_same_bytes(kind, checkpoint_of, tmp_path):
    given = pictures_of(kind) if "expert" not in kind else {}
    with frameloom.load(checkpoint_of(kind)) as engine:
        wanted = make(engine, tmp_path / "whole.mp4", **given)
        moments = MOMENTS if kind in ("one expert", "vace") else [("denoise", 3), ("decode", 1)]
        for stage, step in moments:
            name = begun(engine, tmp_path / "a.mp4", stage, step, **given)
            engine.finish(job.find(name))
            assert (tmp_path / "a.mp4").read_bytes() == wanted, (stage, step)
            (tmp_path / "a.mp4").unlink()


@pytest.mark.parametrize("output", ["a.gif", "frames", "%04d.png", "names.with.dots/"])
def test_every_kind_of_output_is_gone_on_with(output, checkpoint_of, tmp_path):
    with frameloom.load(checkpoint_of()) as engine:
        with pytest.raises(Killed):
            engine.generate_to(f"{tmp_path}/{output}", PROMPT, job=True, progress=ends_at("decode", 1), **SIZE)
        made = engine.finish(job.find(None))
    assert made["output"] == str(tmp_path / output).rstrip("/")


def test_a_job_is_gone_on_with_by_another_process_of_the_library(checkpoint_of, tmp_path, monkeypatch):
    """The model is loaded again as it was, with relative paths and parts."""
    monkeypatch.chdir(checkpoint_of().parent)
    parts = {"vae": "model/vae"}
    with frameloom.load("model", parts=parts, dtype="bfloat16", rewrites=["vae.bands=off"]) as engine:
        wanted = make(engine, tmp_path / "whole.webm", negative_prompt="blue", guidance_scale=3)
        begun(engine, tmp_path / "a.webm", "denoise", 2, negative_prompt="blue", guidance_scale=3)
    monkeypatch.chdir(tmp_path)
    steps = []
    made = frameloom.resume(progress=lambda progress: steps.append((progress.stage, progress.step)))
    assert (tmp_path / "a.webm").read_bytes() == wanted
    assert made["output"] == str(tmp_path / "a.webm")
    assert ("denoise", 1) not in steps
    assert ("denoise", 3) in steps


def test_the_variant_of_the_files_is_that_of_the_job(checkpoint_of, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint_of(), folder)
    (whole,) = (folder / "transformer").glob("*.safetensors")
    halves = {name: x.half() for name, x in load_file(whole).items()}
    save_file(halves, whole.with_name(f"{whole.stem}.fp16.safetensors"))
    with frameloom.load(folder, dtype="float32", variant="fp16") as engine:
        wanted = make(engine, tmp_path / "whole.mp4")
        name = begun(engine, tmp_path / "a.mp4", "denoise", 2)
    frameloom.resume(name)
    assert (tmp_path / "a.mp4").read_bytes() == wanted


def test_what_is_finished_is_small_and_says_so(checkpoint_of, folder, tmp_path):
    with frameloom.load(checkpoint_of()) as engine:
        make(engine, tmp_path / "a.mp4")
        make(engine, tmp_path / "b.mp4", keep_latents=True)
    first, second = frameloom.jobs()
    assert {first["state"], second["state"]} == {"finished"}
    assert first["prompt"] == PROMPT
    assert first["output"] == str(tmp_path / "a.mp4")
    assert sorted(p.name for p in (folder / first["name"]).iterdir()) == ["finished.json", "job.json", "lock"]
    assert (folder / second["name"] / "latents.safetensors").exists()
    with pytest.raises(RequestError, match=r"is finished, and its video is at .*a\.mp4"):
        frameloom.resume(first["name"])
    with pytest.raises(RequestError, match=r"no job .* is unfinished"):
        frameloom.resume()


def test_without_a_job_nothing_is_kept(checkpoint_of, folder, tmp_path):
    with frameloom.load(checkpoint_of()) as engine:
        engine.generate_to(tmp_path / "a.mp4", PROMPT, **SIZE)
    assert not folder.exists()


def entries(folder, name):
    return sorted(folder.joinpath(name).glob("*.safetensors"))


def test_damaged_entries_are_computed_again_from_the_last_good_one(checkpoint_of, folder, tmp_path, caplog):
    with frameloom.load(checkpoint_of()) as engine:
        wanted = make(engine, tmp_path / "whole.mp4")
        for damage in (
            lambda data: data[: len(data) // 2],
            lambda data: data[:-1] + bytes([data[-1] ^ 1]),
            lambda _: b"",
        ):
            name = begun(engine, tmp_path / "a.mp4", "denoise", 3)
            last = entries(folder, name)[-1]
            assert last.name == "step-000003.safetensors"
            last.write_bytes(damage(last.read_bytes()))
            with caplog.at_level(logging.INFO, logger="frameloom"):
                engine.finish(job.find(name))
            assert "going on after step 2" in caplog.text
            caplog.clear()
            assert (tmp_path / "a.mp4").read_bytes() == wanted
            (tmp_path / "a.mp4").unlink()


@pytest.mark.parametrize("which", range(6))
def test_any_entry_may_be_lost_or_of_another_job(which, checkpoint_of, folder, tmp_path):
    with frameloom.load(checkpoint_of()) as engine:
        wanted = make(engine, tmp_path / "whole.mp4")
        other = begun(engine, tmp_path / "b.mp4", "decode", 9, seed=6)
        for foreign in (False, True):
            name = begun(engine, tmp_path / "a.mp4", "decode", 9)
            there = [path for path in entries(folder, name) if path.stem != job.INPUTS]
            path = there[which % len(there)]
            path.unlink()
            if foreign:
                path.write_bytes((folder / other / path.name).read_bytes())
            engine.finish(job.find(name))
            assert (tmp_path / "a.mp4").read_bytes() == wanted, path.name
            (tmp_path / "a.mp4").unlink()


def test_a_damaged_description_is_one_sentence(checkpoint_of, folder, tmp_path):
    with frameloom.load(checkpoint_of()) as engine:
        name = begun(engine, tmp_path / "a.mp4", "denoise", 1)
    path = folder / name / "job.json"
    good = path.read_text()
    for bad in ("", "[]", "{}", good[:-9], good.replace('"seed": 5', '"seed": 6'), good.replace("job 1", "job 9")):
        path.write_text(bad)
        with pytest.raises(RequestError, match=r"job\.json (cannot be read|is damaged)") as error:
            frameloom.resume(name)
        assert "\n" not in str(error.value)
        assert frameloom.jobs()[-1]["state"] == "damaged"


def test_lost_pictures_are_one_sentence(checkpoint_of, folder, tmp_path):
    with frameloom.load(checkpoint_of("image")) as engine:
        name = begun(engine, tmp_path / "a.mp4", "denoise", 1, **pictures_of("image"))
    (folder / name / "inputs.safetensors").unlink()
    with pytest.raises(RequestError, match="has lost the pictures"):
        frameloom.resume(name)


def test_another_version_or_model_is_told(checkpoint_of, tmp_path):
    with frameloom.load(checkpoint_of()) as engine:
        wanted = make(engine, tmp_path / "whole.mp4")
        name = begun(engine, tmp_path / "a.mp4", "denoise", 1)
    with (
        frameloom.load(checkpoint_of("two experts")) as other,
        pytest.raises(RequestError, match=r"began with something else: model was \w+, is \w+; give it the files"),
    ):
        other.finish(job.find(name), anyway=True)
    with frameloom.load(checkpoint_of(), exactness="bitwise") as exact:
        with pytest.raises(RequestError, match=r"rewrites was .*, is .*--anyway"):
            exact.finish(job.find(name))
        exact.finish(job.find(name), anyway=True)
    assert len((tmp_path / "a.mp4").read_bytes()) > len(wanted) / 2


def test_a_job_has_one_worker(checkpoint_of, folder, tmp_path):
    with frameloom.load(checkpoint_of()) as engine:
        name = begun(engine, tmp_path / "a.mp4", "denoise", 1)
        with (folder / name / "lock").open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            assert frameloom.jobs()[-1]["state"] == "running"
            for attempt in (
                lambda: engine.finish(job.find(name)),
                lambda: frameloom.resume(name),
                lambda: jobs.forget(name),
            ):
                with pytest.raises(RequestError, match=r"is being worked on by .*; wait for it, or end it first$"):
                    attempt()
            with pytest.raises(RequestError, match=r"no job .* is unfinished"):
                frameloom.resume()
    jobs.forget(name)
    assert frameloom.jobs() == []


@pytest.mark.parametrize("name", ["nothing", "2", ""])
def test_names_that_are_none_or_several(name, checkpoint_of, tmp_path):
    with frameloom.load(checkpoint_of()) as engine:
        for _ in range(2):
            begun(engine, tmp_path / "a.mp4", "denoise", 0)
    with pytest.raises(RequestError, match=r"(there is no job|2 jobs begin with)"):
        frameloom.resume(name)


def test_an_error_says_how_to_go_on(checkpoint_of, tmp_path, monkeypatch):
    with frameloom.load(checkpoint_of()) as engine:

        def fails(*_, **__):
            raise InternalError("the decoder has gone")
            yield

        with monkeypatch.context() as patch:
            patch.setattr("frameloom.pipeline.stages.decode", fails)
            with pytest.raises(InternalError, match=r"has gone; what was computed is kept, and `frameloom resume 2\d+"):
                make(engine, tmp_path / "a.mp4")
        engine.finish(job.find(None))
    assert (tmp_path / "a.mp4").exists()


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_a_disk_that_fails_at_any_call_costs_the_journal_and_not_the_run(
    call, checkpoint_of, folder, tmp_path, monkeypatch
):
    """Every n-th call of a kind fails for the journal's files, for every n there is."""
    real = {"fsync": os.fsync, "replace": os.replace, "open": Path.open}
    with frameloom.load(checkpoint_of()) as engine:
        wanted = make(engine, tmp_path / "whole.mp4")
        for n in range(100):
            calls = []

            def fails(*given, calls=calls, n=n, **options):
                about = str(given[0]) if call != "fsync" else os.readlink(f"/proc/self/fd/{given[0]}")
                writes = call != "open" or "partial" in about
                if writes and str(folder) in about:
                    calls.append(about)
                    if len(calls) == n + 1:
                        raise OSError(errno.ENOSPC, "No space left on device")
                return real[call](*given, **options)

            with monkeypatch.context() as patch:
                patch.setattr(*((Path, "open") if call == "open" else (os, call)), fails)
                found = make(engine, tmp_path / "a.mp4")
            assert found == wanted, n
            assert not list(folder.rglob("*partial*"))
            if len(calls) <= n:
                break
        assert n > 5


def test_finished_jobs_make_room_for_others_and_unfinished_ones_stay(checkpoint_of, tmp_path, monkeypatch):
    with frameloom.load(checkpoint_of()) as engine:
        kept = begun(engine, tmp_path / "u.mp4", "denoise", 1)
        monkeypatch.setattr(jobs, "MAX_FINISHED", 2)
        for index in range(4):
            make(engine, tmp_path / f"{index}.mp4")
    states = [(one["name"], one["state"]) for one in frameloom.jobs()]
    assert states[0] == (kept, "unfinished")
    assert [Path(one["output"]).name for one in frameloom.jobs()[1:]] == ["1.mp4", "2.mp4", "3.mp4"]


def test_a_job_says_what_it_was_asked(checkpoint_of, folder, tmp_path):
    with frameloom.load(checkpoint_of(), dtype="bfloat16") as engine:
        name = begun(engine, tmp_path / "a.mp4", "denoise", 1, quality=50)
        told = json.loads((folder / name / "job.json").read_text())
        assert told["origin"]["config"] == json.loads(
            json.dumps(job._plain(job.asdict(EngineConfig(dtype="bfloat16"))))
        )
        found = job.find(name)
        assert found.order.quality == 50
        assert repr(found.request) == repr(engine.resolve(PROMPT, **SIZE))


# --- what others do meanwhile ---


def test_a_lora_with_other_numbers_is_told_when_a_job_is_resumed(checkpoint_of, tmp_path):
    path = tmp_path / "l.safetensors"
    write_lora(path, 0.1)
    for number, ways in enumerate(({"loras": [str(path)]}, {})):
        with frameloom.load(checkpoint_of(), **ways) as engine:
            engine.set_loras([] if ways else [str(path)])
            name = begun(engine, tmp_path / f"{number}.mp4", "denoise", 1)
        write_lora(path, 0.2)
        for anyway in (False, True):
            with pytest.raises(RequestError, match=r"LoRAs.* was \w{16}, is \w{16}; give it the files"):
                frameloom.resume(name, anyway=anyway)
        write_lora(path, 0.1)
        frameloom.resume(name)


def write_lora(path, value):
    factors = {"lora_A.weight": torch.full((2, 32), value), "lora_B.weight": torch.full((32, 2), value)}
    save_file({f"transformer.blocks.0.attn1.to_q.{name}": factor for name, factor in factors.items()}, path)


def test_jobs_that_begin_at_the_same_moment_have_folders_of_their_own(checkpoint_of, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("frameloom.engine.job.time.time", lambda: 1_800_000_000.0)
    with frameloom.load(checkpoint_of()) as engine:
        names = [begun(engine, tmp_path / f"{n}.mp4", "denoise", 1) for n in range(2)]
        assert [told["name"] for told in frameloom.jobs()] == names
        assert len(set(names)) == 2


def test_a_damaged_newest_job_is_passed_over(checkpoint_of, folder, tmp_path, caplog):
    with frameloom.load(checkpoint_of()) as engine:
        good, damaged = (begun(engine, tmp_path / f"{n}.mp4", "denoise", 1) for n in range(2))
        (folder / damaged / "job.json").write_text("{}")
        assert job.find(None).name == good
    assert f"`frameloom jobs --forget {damaged}` removes it" in caplog.text


def test_a_job_outside_the_folder_of_jobs_is_resumed_by_its_path(checkpoint_of, folder, tmp_path, run):
    with frameloom.load(checkpoint_of()) as engine:
        name = begun(engine, tmp_path / "a.mp4", "denoise", 1)
    elsewhere = (folder / name).rename(tmp_path / "elsewhere")
    code, _, err = run("resume", elsewhere)
    assert code == 0, err
    assert (tmp_path / "a.mp4").exists()


def test_folders_of_runs_that_ended_before_they_had_a_job_are_removed_later(checkpoint_of, folder, tmp_path):
    old, new, other = (folder / name for name in ("20260101-000000-000000", "20260101-000000-000001", "mine"))
    for left in (old, new, other):
        left.mkdir(parents=True)
        (left / "lock").touch()
    for left in (old, other):
        os.utime(left, (0, 0))
    with frameloom.load(checkpoint_of()) as engine:
        begun(engine, tmp_path / "a.mp4", "denoise", 1)
    assert not old.exists()
    assert new.exists()
    assert other.exists()


def test_a_job_that_cannot_be_written_is_one_sentence(checkpoint_of, folder, tmp_path):
    with frameloom.load(checkpoint_of()) as engine:
        name = begun(engine, tmp_path / "a.mp4", "denoise", 1)
        lock = folder / name / "lock"
        lock.unlink()
        lock.symlink_to(tmp_path / "nowhere")
        with pytest.raises(OutputError, match=r"cannot be written \(.*\); make it writable, or resume a copy of it"):
            frameloom.resume(name)


def test_an_error_does_not_promise_what_could_not_be_written(checkpoint_of, folder, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise InternalError("the decoder has gone")
        yield

    monkeypatch.setattr("frameloom.pipeline.stages.decode", fails)
    real = journal.Journal.put

    def put(self, name, *given, **options):
        if name != job.INPUTS:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, name, *given, **options)

    monkeypatch.setattr(journal.Journal, "put", put)
    with frameloom.load(checkpoint_of()) as engine, pytest.raises(InternalError, match="what could be written is kept"):
        make(engine, tmp_path / "a.mp4")
