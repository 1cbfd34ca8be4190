"""Every task of the schema has its format; prompts are the seeds' words."""

from megatron_omni.data.tasks import FORMATS, prompt_for, target_text
from megatron_omni.schema import TASKS


def test_every_task_has_a_format() -> None:
    assert set(FORMATS) == set(TASKS)


def test_prompts_are_those_of_the_mission() -> None:
    assert {task: prompt_for(task) for task in TASKS if prompt_for(task)} == {
        "transcribe": "Transcribe:",
        "describe": "Describe all information you can hear:",
    }


def test_letter_case_of_targets() -> None:
    assert target_text("transcribe", "The weather.") == "the weather."
    assert target_text("converse", "That's wonderful!") == "That's wonderful!"
