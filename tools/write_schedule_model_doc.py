"""Write docs/schedule-model.md from the worked examples: `python tools/write_schedule_model_doc.py`."""

from pathlib import Path

from rto_megatron.planner.worked_examples import schedule_model_page

Path(__file__).parents[1].joinpath("docs/schedule-model.md").write_text(schedule_model_page())
