"""The checks that know Megatron and the stages, in the order in which a run would come to them."""

from typing import Any

from rto_megatron.config.run import ConvertRun, EvaluateRun, RTORun
from rto_megatron.doctor.conversion import check_conversion
from rto_megatron.doctor.data import Rows, check_data
from rto_megatron.doctor.findings import Report
from rto_megatron.doctor.layout import check_layout, check_sizes
from rto_megatron.doctor.machine import Place
from rto_megatron.doctor.memory import check_memory
from rto_megatron.doctor.rewards import check_rewards
from rto_megatron.doctor.roles import check_roles
from rto_megatron.doctor.run_folder import check_disk, check_earlier_run, check_place
from rto_megatron.stages.resume import TrainingRun


def examine_run(report: Report, config: Any, place: Place, *, hashes: bool) -> None:
    """Add a section for each subject; what cannot be known because of an earlier mistake is left out."""
    num_data = check_layout(report.section("layout"), config, ranks=place.ranks)
    if isinstance(config, ConvertRun):
        check_conversion(report.section("conversion"), config)
        check_place(report.section("folder"), config)
        return
    roles = check_roles(report.section("checkpoints and roles"), config, hashes=hashes)
    found, rows = report.section("data"), Rows()
    if roles.tokenizer is not None:
        rows = check_data(found, config, roles.tokenizer)
    else:
        found.note("data were not read", why="there is no tokenizer to read them with")
    num_steps = None
    if isinstance(config, TrainingRun):
        num_steps = check_sizes(report.section("batch sizes"), config, rows, num_data)
    if isinstance(config, RTORun | EvaluateRun):
        check_rewards(report.section("rewards"), config)
    if roles.models and num_data is not None:
        found = report.section("memory")
        check_memory(found, config, roles.models, place, num_data=num_data)
        if roles.missing:
            found.note(f"without {', '.join(roles.missing)}", why="what cannot be opened cannot be counted")
    found = report.section("run folder")
    check_place(found, config)
    if isinstance(config, TrainingRun):
        check_earlier_run(found, config, roles, rows, num_steps)
    if roles.models and num_steps is not None:
        check_disk(found, config, roles.models, num_steps=num_steps)
