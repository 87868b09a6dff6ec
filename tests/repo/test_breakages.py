"""A check counts when it has been seen to fail: each deliberate fault must be caught."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

DRAW_LOCALLY = "copy_(whole[: local(target).shape[0], : local(target).shape[1]])"

# file, what stands there, what is put there, the tests that must notice
BREAKAGES = {
    "merge without the scale": (
        *(
            "relora_core/products/delta.py",
            "total.flatten(1).add_(product, alpha=self.s)",
            "total.flatten(1).add_(product)",
        ),
        "tests/core/sites/test_sites.py",
    ),
    "the sum formed without the scale": (
        *("relora_core/products/factored.py", "return self.scale * (self", "return (self"),
        "tests/core/low_rank/test_low_rank.py",
    ),
    "merge leaves B": (
        *(
            "relora_core/low_rank/parametrization.py",
            "        B.zero_()\n        write()",
            "        write()",
        ),
        "tests/core/sites/test_sites.py",
    ),
    "A zero at first": (
        *(
            "relora_core/low_rank/parametrization.py",
            "copy_from_full_(self.lora_A, draw)",
            "self.lora_A.zero_()",
        ),
        "tests/core/low_rank/test_low_rank.py",
    ),
    "a wrapper is taken for what is inside it": (
        *(
            "relora_core/low_rank/register.py",
            'module._modules.get("parametrizations")',
            'getattr(module, "parametrizations", None)',
        ),
        "tests/core/sites/test_sites.py",
    ),
    "factors are not seen to be gathered": (
        *(
            "relora_core/distributed/fsdp.py",
            "owner_of(parameter) is module",
            "owner_of(parameter) is None",
        ),
        "tests/distributed/test_sharded_equals_single.py",
    ),
    "a graph for each block": (
        *("relora_core/low_rank/register.py", "    share_class_(module)\n    base", "    base"),
        "tests/core/low_rank/test_shared_class.py",
    ),
    "a parametrization of one block is one of all": (
        *("relora_core/low_rank/shared_class.py", "        own_class_(module)\n", "        pass\n"),
        "tests/core/low_rank/test_shared_class.py",
    ),
    "a write to another tensor is refused": (
        *("relora_core/products/lazy_weight.py", "if holds_lazy(written):", "if True:"),
        "tests/core/low_rank/test_low_rank.py",
    ),
    "a restart takes what no longer fits its low bits": (
        *(
            "relora_core/low_rank/parametrization.py",
            "self._refuse_converted(base)\n        A, s",
            "A, s",
        ),
        "tests/core/test_restart.py",
    ),
    "draws not keyed by name": (
        *(
            "relora_core/low_rank/parametrization.py",
            'f"{seed}/{name}/{restart}"',
            'f"{seed}/{restart}"',
        ),
        "tests/core/low_rank/test_low_rank.py",
    ),
    "draws not keyed by restart": (
        *(
            "relora_core/low_rank/parametrization.py",
            'f"{seed}/{name}/{restart}"',
            'f"{seed}/{name}"',
        ),
        "tests/core/sites/test_sites.py",
    ),
    "scale missing from A's gradient": (
        *(
            "relora_core/products/two_paths.py",
            "dA = scaled(h.t() @ x, ctx.s) if need_A",
            "dA = h.t() @ x if need_A",
        ),
        "tests/core/products/test_linear.py",
    ),
    "no second derivative through u": (
        *("relora_core/products/two_paths.py", "if torch.is_grad_enabled():", "if False:"),
        "tests/core/products/test_linear.py",
    ),
    "a merge that is not in place": (
        *("relora_core/products/delta.py", "total.copy_(sum.view(total.shape))", "None"),
        "tests/core/sites/test_sites.py",
    ),
    "a restart takes the trained scale back": (
        *(
            "relora_core/low_rank/parametrization.py",
            "self._draw_(self.restart + 1)\n        self.restart += 1",
            "self.restart += 1\n        self.reset_parameters()",
        ),
        "tests/core/low_rank/test_dropout_and_scale.py",
    ),
    "dropout in evaluation": (
        *(
            "relora_core/low_rank/parametrization.py",
            "self.dropout if self.training else 0.0",
            "self.dropout",
        ),
        "tests/core/low_rank/test_dropout_and_scale.py",
    ),
    "a temporary of the input's size": (
        *("relora_core/products/thin.py", "return (u @ v).addmm_(", "return (u @ v).addmm("),
        "tests/core/products/test_linear.py",
    ),
    "W trained": (
        *(
            "relora_core/low_rank/register.py",
            "base.requires_grad_(False)",
            "base.requires_grad_(True)",
        ),
        "tests/core/sites/test_sites.py",
    ),
    "one entry too few pruned": (
        *("relora_core/optim/radix_select.py", "else math.floor(ratio", "else math.ceil(ratio"),
        "tests/core/optim/test_pruning.py",
    ),
    "ties all pruned": (
        *("relora_core/optim/radix_select.py", "    if left < ties:", "    if left < 0:"),
        "tests/core/optim/test_pruning.py",
    ),
    "threshold off by one": (
        *("relora_core/optim/radix_select.py", "torch.le(_key(chunk)", "torch.lt(_key(chunk)"),
        "tests/core/optim/test_pruning.py",
    ),
    "ranked by value, not by magnitude": (
        *("relora_core/optim/radix_select.py", "values.abs().view(", "values.view("),
        "tests/core/optim/test_pruning.py",
    ),
    "second moment not pruned": (
        *("relora_core/optim/reset.py", "own * len(state.moments) if joint", "own if joint"),
        "tests/core/optim/test_reset.py",
    ),
    "each moment ranked by itself": (
        *("relora_core/optim/reset.py", 'joint = reset.masks == "joint"', "joint = False"),
        "tests/core/optim/test_reset.py",
    ),
    "random masks the same for every parameter": (
        *("relora_core/optim/reset.py", 'f"{keys[state.index]}/{number}"', 'f"{number}"'),
        "tests/core/optim/test_reset.py",
    ),
    "factors left at a full reset": (
        *("relora_core/optim/reset.py", "statistic.zero_()", "pass"),
        "tests/core/optim/test_optimizer_table.py",
    ),
    "a copy left behind": (
        *(
            "relora_core/optim/reset.py",
            "local(copy).copy_(local(state.parameter.detach()))",
            "pass",
        ),
        "tests/core/optim/test_reset.py",
    ),
    "the step counted on": (
        *("relora_core/optim/reset.py", "            count.fill_(begin)", "            pass"),
        "tests/core/optim/test_optimizer_table.py",
    ),
    "state indexed": (
        *("relora_core/optim/moments.py", "one.state.get(p)", "one.state[p]"),
        "tests/core/optim/test_optimizer_table.py",
    ),
    "wrong code for zero": (
        *("relora_core/optim/quantized.py", "table.abs().argmin()", "table.argmin()"),
        "tests/core/optim/test_optimizer_table.py",
    ),
    "codes ranked instead of values": (
        *("relora_core/optim/quantized.py", "(self.table[flat.int()] * scales)", "(flat.float())"),
        "tests/core/optim/test_optimizer_table.py",
    ),
    "a hook run twice": (
        *("relora_core/optim/optimizer.py", "step.hooked = True", "step.hooked = False"),
        "tests/core/optim/test_optimizer.py",
    ),
    "a scaled step not unscaled": (
        *(
            "relora_core/optim/optimizer.py",
            '_step_supports_amp_scaling = _delegated("_step_supports_amp_scaling")',
            "_step_supports_amp_scaling = True",
        ),
        "tests/core/optim/test_optimizer_table.py",
    ),
    "ramp off by one": (
        *(
            "relora_core/schedule.py",
            "min(1.0, since / self.warmup)",
            "min(1.0, (since + 1) / self.warmup)",
        ),
        "tests/core/test_schedule.py",
    ),
    "a ramp to where the cosine was": (
        *("relora_core/schedule.py", "return step - since + self.warmup", "return step - since"),
        "tests/core/test_schedule.py",
    ),
    "the schedule's smooth rate not saved": (
        *("relora_core/schedule.py", 'self._smooth = list(state_dict["smooth"])', "pass"),
        "tests/core/test_schedule.py",
    ),
    "restart one step late": (
        *(
            "relora_core/schedule.py",
            "and (step - self._first) % self.every == 0",
            "and (step - self._first) % self.every == 1",
        ),
        "tests/core/test_schedule.py",
    ),
    "the ramp feeds on itself": (
        *("relora_core/schedule.py", "return smooth if now == last else changed", "return now"),
        "tests/core/test_schedule.py",
    ),
    "restart without looking first": (
        *("relora_core/restart.py", "if not math.isfinite(norm)", "if norm < 0"),
        "tests/core/test_restart.py",
    ),
    "merge into FSDP's gathered copy": (
        *("relora_core/distributed/fsdp.py", "module.reshard()", "pass"),
        "tests/distributed/test_sharded_equals_single.py",
    ),
    "each rank prunes its own part": (
        *(
            "relora_core/distributed/sharding.py",
            "return (mesh, tuple(split)) if split else None",
            "return None",
        ),
        "tests/distributed/test_sharded_equals_single.py",
    ),
    "each rank draws its own part": (
        *(
            "relora_core/distributed/sharding.py",
            "local(target).copy_(local_part(whole, target))",
            DRAW_LOCALLY,
        ),
        "tests/distributed/test_sharded_equals_single.py",
    ),
    "a shard's part taken for the norm": (
        *("relora_core/restart.py", "reduced(own, like(sites[members[0]][1]))", "own"),
        "tests/distributed/test_sharded_equals_single.py",
    ),
    "the bias added by every process": (
        *("relora_core/products/tensor_parallel.py", "else once(bias)", "else local(bias)"),
        "tests/distributed/test_tensor_parallel.py",
    ),
    "a whole factor learns from one process": (
        *(
            "relora_core/distributed/dtensor.py",
            "    whole = replicated(tensor)\n    assert isinstance(whole, DTensor)\n"
            "    return whole.to_local(grad_placements=[Partial()])",
            "    return replicated(tensor).to_local()",
        ),
        "tests/distributed/test_tensor_parallel.py",
    ),
    "the wrong one named for a skipped restart": (
        *("relora_core/distributed/consensus.py", "if not store.check([f", "if store.check([f"),
        "tests/distributed/test_roll_call.py",
    ),
    "another restart goes unnoticed": (
        *("relora_core/distributed/consensus.py", "if other != said:", "if not other:"),
        "tests/distributed/test_roll_call.py",
    ),
    "one process refuses, the others restart": (
        *(
            "relora_core/restart.py",
            "with agreed(model, call, timeout):  # of what only one of them may see",
            "if True:",
        ),
        "tests/distributed/test_roll_call.py",
    ),
    "each process looks at its own part of W": (
        *("relora_core/restart.py", "_over_shards(half, own, shard_max)", "to_floats(own)"),
        "tests/distributed/test_roll_call.py",
    ),
    "sites without a name draw alike": (
        *("relora_core/sites/site.py", "site.low_rank.name = site.low_rank.name or name", "pass"),
        "tests/core/sites/test_sites.py",
    ),
    "a file that its owner alone may read": (
        *("relora_core/files/whole.py", "        partial.chmod(mode)", "        pass"),
        "tests/core/sites/test_sites.py",
    ),
    "a write that failed leaves its part": (
        *("relora_core/files/whole.py", "partial.unlink(missing_ok=True)", "pass"),
        "tests/core/sites/test_sites.py",
    ),
    "a clock is another if it is given otherwise": (
        *(
            "relora_core/schedule.py",
            "replace(saved, first=saved._first) != replace(own, first=own._first)",
            "saved != own",
        ),
        "tests/core/test_schedule.py",
    ),
    "a compiled model comes back bare": (
        *("relora_core/sites/targets.py", "    return model\n", "    return inner\n"),
        "tests/core/sites/test_sites.py",
    ),
    "quiet is not": (
        *(
            "reference_trainer/logging/console.py",
            "log.setLevel(level)",
            "log.setLevel(logging.INFO)",
        ),
        "tests/trainer/logging/test_console.py",
    ),
    "a tie that cannot be undone": (
        *("relora_core/low_rank/low_bits.py", "bits + 0x8000", "bits + 0x7FFF"),
        "tests/core/low_rank/test_low_bits.py",
    ),
    "low bits lost at a merge": (
        *(
            "relora_core/low_rank/parametrization.py",
            "upper, low = split(value)",
            "upper, low = value, 0",
        ),
        "tests/core/low_rank/test_low_bits.py",
    ),
    "low bits not saved": (
        *(
            "relora_core/low_rank/parametrization.py",
            'destination[prefix + "low_bits"] = self.low_bits',
            "pass",
        ),
        "tests/core/low_rank/test_low_bits.py",
    ),
    "a checkpoint of the upper half": (
        *(
            "reference_trainer/train_state.py",
            "rows_of(site.exact(), world)",
            "rows_of(site.weight, world)",
        ),
        "tests/trainer/test_run.py",
    ),
    "an all-reduce counted as one pass": (
        *(
            "reference_trainer/bench/communication.py",
            '"c10d::allreduce_": _Collective("all-reduce", 0, passes=2)',
            '"c10d::allreduce_": _Collective("all-reduce", 0)',
        ),
        "tests/distributed/test_communication.py",
    ),
    "a deep model is tracked as a shallow one": (
        *(
            "reference_trainer/bench/estimate/depth.py",
            "few + (layers - FEW) * (more - few)",
            "more",
        ),
        "tests/trainer/bench/test_estimate.py",
    ),
    "what deep models send is that of shallow ones": (
        *("reference_trainer/bench/communication.py", "further = layers - _MORE", "further = 0"),
        "tests/trainer/bench/test_estimate.py",
    ),
    "optimizer state lost at the hand-off": (
        *(
            "reference_trainer/checkpoint/load.py",
            "optimizer.state[parameters[name]] = state",
            "pass",
        ),
        "tests/trainer/test_run.py",
    ),
    "schedule not restored": (
        *(
            "reference_trainer/train_state.py",
            "schedule.load_state_dict(position.schedule)",
            "step()",
        ),
        "tests/trainer/test_run.py",
    ),
    "data order restarts at a resume": (
        *("reference_trainer/train.py", "run.feed.at(step)", "run.feed.at(step - start)"),
        "tests/trainer/test_run.py",
    ),
    "a step that is not finite is taken": (
        *("reference_trainer/train.py", "        if broken:\n", "        if False:\n"),
        "tests/trainer/test_faults.py",
    ),
    "each process skips by itself": (
        *(
            "reference_trainer/distributed.py",
            "dist.all_reduce(together, dist.ReduceOp.MAX, group=self.group)",
            "pass",
        ),
        "tests/distributed/test_faults_together.py",
    ),
    "a checkpoint shares memory with the training": (
        *(
            "reference_trainer/checkpoint/save.py",
            "copies = {name: _on_host(tensor) for name, tensor in state.items()}",
            "return state",
        ),
        "tests/faults/test_resume.py",
    ),
    "a file of another checksum is taken": (
        *("reference_trainer/checksums.py", "if actual != checksums[name]:", "if False:"),
        "tests/faults/test_damaged_files.py",
    ),
    "a sealed file is not looked at": (
        *("reference_trainer/checksums.py", "if seal != _digest(value):", "if False:"),
        "tests/faults/test_damaged_files.py",
    ),
    "a log is taken as it is": (
        *("reference_trainer/logging/metrics.py", "or line != _line(record)", ""),
        "tests/faults/test_damaged_files.py",
    ),
    "an attempt of a launcher begins anew": (
        *("reference_trainer/run.py", "resume or (again and begun(config))", "resume"),
        "tests/faults/test_kills.py",
    ),
    "a checkpoint counts before it is whole": (
        *(
            "reference_trainer/checkpoint/find.py",
            "if not (found / MANIFEST).exists():",
            "if not found.exists():",
        ),
        "tests/faults/test_kills.py",
    ),
    "who does not answer is not named": (
        *("reference_trainer/distributed.py", "if not store.check([key])", "if store.check([key])"),
        "tests/faults/test_disk.py",
    ),
    "half a checkpoint stays on a full disk": (
        *(
            "reference_trainer/checkpoint/save.py",
            "                    _remove(target)",
            "                    pass",
        ),
        "tests/faults/test_disk.py",
    ),
    "an adapter's scale is not compared": (
        *(
            "relora_core/files/adapters.py",
            "if trained is None and not math",
            "if False and not math",
        ),
        "tests/core/files/test_adapters.py",
    ),
    "an embedding's factors as a linear's": (
        *("relora_core/files/peft_format.py", 'name, W, "embedding")', "name, W)"),
        "tests/core/files/test_adapters.py",
    ),
    "an adapter forgets the count of restarts": (
        *(
            "relora_core/files/adapters.py",
            "            if key is not None:",
            "            if False:",
        ),
        "tests/core/files/test_adapters.py",
    ),
    "an adapter's patterns match what ends alike": (
        *("relora_core/files/peft_format.py", 'f"^{re.escape(name)}"', "name"),
        "tests/core/files/test_adapters.py",
    ),
    "what is kept of A changes with its redraw": (
        *(
            "relora_core/diagnostics/update_spectra.py",
            "update.A.to(wide, copy=True)",
            "update.A.to(wide)",
        ),
        "tests/core/diagnostics/test_update_spectra.py",
    ),
    "what is kept of B lacks the scale": (
        *(
            "relora_core/diagnostics/update_spectra.py",
            "update.B.to(wide) * update.s",
            "update.B.to(wide)",
        ),
        "tests/core/diagnostics/test_update_spectra.py",
    ),
    "a spectrum of this process's rows": (
        *(
            "relora_core/diagnostics/update_spectra.py",
            "shard_sum(columns.t() @ columns, B)",
            "columns.t() @ columns",
        ),
        "tests/distributed/test_update_spectra.py",
    ),
    "every process keeps all of A": (
        *("relora_core/distributed/dtensor.py", "p if w.is_replicate() else Shard(dim)", "p"),
        "tests/distributed/test_update_spectra.py",
    ),
    "a kept cycle counts twice": (
        *("relora_core/diagnostics/update_spectra.py", " if new[name] else self._kept[name]", ""),
        "tests/core/diagnostics/test_update_spectra.py",
    ),
    "checkpoints do not hold the spectra": (
        *(
            "reference_trainer/train_state.py",
            "state.tensors(world) | state.followed()",
            "state.tensors(world)",
        ),
        "tests/trainer/test_run.py",
    ),
    "equal loss at the evaluation after it": (
        *(
            "docs/study/tables.py",
            "before + (step - before) * (high - loss) / (high - low)",
            "step",
        ),
        "tests/docs/test_study_tables.py",
    ),
    "long wavelengths are not scaled": (
        *("reference_trainer/model/llama.py", "(share + (1 - share) / self.factor)", "share"),
        "tests/trainer/test_pretrained.py",
    ),
    "rotary halves swapped": (
        *(
            "reference_trainer/model/llama.py",
            "torch.cat((-second, first)",
            "torch.cat((second, -first)",
        ),
        "tests/trainer/model/test_model.py",
    ),
    "the norm of a skipped step is written": (
        *("reference_trainer/logging/progress.py", "self._norm.item()", "norm.item()"),
        "tests/trainer/test_faults.py",
    ),
    "a merged copy stays what it was at a step": (
        *(
            "relora_core/sites/merged_copies.py",
            "return id(low_rank.lora_A) in stepped or",
            "return False and",
        ),
        "tests/core/sites/test_merged_copies.py",
    ),
    "a merged copy stays what it was at a restart": (
        *(
            "relora_core/sites/site.py",
            ".redraw_()\n        self.low_rank._refresh_(self.weight, zero=True)",
            ".redraw_()",
        ),
        "tests/core/sites/test_merged_copies.py",
    ),
    "a deep copy takes its copy for made of its own factors": (
        *(
            "relora_core/low_rank/parametrization.py",
            'return self.__dict__ | {"_made_of": None, "followed": False}',
            "return dict(self.__dict__)",
        ),
        "tests/core/sites/test_merged_copies.py",
    ),
    "an addend is copied": (
        *(
            "relora_core/products/thin.py",
            "if torch.compiler.is_compiling() or _is_seen():",
            "if _is_seen():",
        ),
        "tests/core/products/test_linear.py",
    ),
    "an operation of a view is a kernel": (
        *(
            "reference_trainer/bench/kernels.py",
            "return bool(returns) and all(",
            "return False and all(",
        ),
        "tests/trainer/bench/test_roofline.py",
    ),
    "accumulated gradients take nothing": (
        *(
            "reference_trainer/bench/tracker.py",
            "held += _accumulated(stage.model)",
            "held += []",
        ),
        "tests/distributed/test_estimated_memory.py",
    ),
    "an in-place product is what a checkpoint is asked to keep": (
        *(
            "relora_core/products/thin.py",
            "return is_dispatch_watched() and",
            "return False and is_dispatch_watched() and",
        ),
        "tests/trainer/test_activations.py",
    ),
    "selective checkpointing keeps nothing": (
        *("reference_trainer/activations.py", "return CheckpointPolicy.MUST_SAVE", "pass"),
        "tests/trainer/test_activations.py",
    ),
    "a gather of many takes the first process's rows for all": (
        *(
            "relora_core/distributed/dtensor.py",
            "rows = [-(-tensor.shape[0] // processes)",
            "rows = [-(-tensor.shape[0] // 1)",
        ),
        "tests/distributed/test_merged_copies.py",
    ),
    "copies are gathered site by site": (
        *("relora_core/sites/merged_copies.py", "_AT_ONCE = 8, 2**28", "_AT_ONCE = 8, 1"),
        "tests/trainer/bench/test_layouts_of_many.py",
    ),
    "every process takes the first one's part": (
        *("reference_trainer/data/batches.py", "processes, -1)[:, rank]", "processes, -1)[:, 0]"),
        "tests/trainer/data/test_data.py",
    ),
    "what was read ahead is taken for any step": (
        *("reference_trainer/data/feed.py", "if ahead and ahead[0] == step else", "if ahead else"),
        "tests/trainer/data/test_data.py",
    ),
    "logits lie as they come": (
        *("reference_trainer/model/head.py", "_WORD = 8", "_WORD = 1"),
        "tests/trainer/model/test_head.py",
    ),
    "a job's children outlive it": (
        *(
            "reference_trainer/bench/suite/runner.py",
            "os.killpg(process.pid, signal.SIGKILL)",
            "process.kill()",
        ),
        "tests/trainer/bench/test_gpu_suite.py",
    ),
    "a suite ends with its first bad job": (
        *(
            "reference_trainer/bench/suite/runner.py",
            '        log.warning(f"stage {job.stage}, ',
            '        raise SystemExit(f"stage {job.stage}, ',
        ),
        "tests/trainer/bench/test_gpu_suite.py",
    ),
    "a product over a bank forms the sum": (
        *("relora_core/products/factored.py", "return self.merged is None and", "return False and"),
        "tests/core/products/test_banks.py",
    ),
    "grouped products with rows of any length": (
        *(
            "relora_core/products/forms.py",
            "in_whole_words(lazy.lora_A",
            "(lambda *f: f)(lazy.lora_A",
        ),
        "tests/core/products/test_banks.py",
    ),
    "a bank is factored across its matrices": (
        *("relora_core/low_rank/candidates.py", "    if given is None:\n", "    if False:\n"),
        "tests/core/products/test_banks.py",
    ),
    "compiled, the operands of @ as they come": (
        *("relora_core/products/forms.py", "    if left and right:", "    if False:"),
        "tests/core/low_rank/test_low_rank.py",
    ),
    "ties are looked for in the model alone": (
        *("relora_core/sites/targets.py", "    refuse_ties(chosen, kept=True)\n", ""),
        "tests/core/low_rank/test_ties.py",
    ),
    "what a module keeps in a list is no tie": (
        *("relora_core/low_rank/ties.py", "kept_by(modules) if kept else ()", "()"),
        "tests/core/low_rank/test_ties.py",
    ),
    "ties are looked for in storages": (
        *("relora_core/low_rank/ties.py", "begin = part.data_ptr()", "begin = id(part)"),
        "tests/core/low_rank/test_ties.py",
    ),
    "memory that another library has lent is W's alone": (
        *(
            "relora_core/low_rank/ties.py",
            "lent = not part.untyped_storage().resizable()",
            "lent = False",
        ),
        "tests/core/low_rank/test_ties.py",
    ),
    "columns of one matrix are tied": (
        *("relora_core/low_rank/ties.py", "    if dense or size", "    if True or size"),
        "tests/core/low_rank/test_ties.py",
    ),
    "a module around a site may own its W": (
        *(
            "relora_core/low_rank/ties.py",
            "if any(one is module for one in other.modules()):",
            "if False:",
        ),
        "tests/core/low_rank/test_ties.py",
    ),
    "a site keeps the gradient of W": (
        *("relora_core/low_rank/register.py", "    base.grad = None", "    pass"),
        "tests/core/sites/test_derived.py",
    ),
    "a W that is trained is restarted": (
        *(
            "relora_core/restart.py",
            "        if site.weight.requires_grad:\n",
            "        if False:\n",
        ),
        "tests/core/sites/test_derived.py",
    ),
    "a torn site is mended by factors alone": (
        *("relora_core/low_rank/register.py", 'if prefix + "original" in state_dict:', "if True:"),
        "tests/core/test_broken_off.py",
    ),
    "a torn site computes": (
        *(
            "relora_core/low_rank/parametrization.py",
            "        self._refuse_torn(self.name)\n        dropout",
            "        dropout",
        ),
        "tests/core/test_broken_off.py",
    ),
    "a site that was trained in between is passed over": (
        *("relora_core/restart.py", "numbers[name] or norms[name]:", "numbers[name]:"),
        "tests/core/test_broken_off.py",
    ),
    "an optimizer of factors alone tells nothing": (
        *(
            "relora_core/optim/stepped.py",
            "own & seen.held for",
            "own & seen.held and seen.reached for",
        ),
        "tests/core/sites/test_derived.py",
    ),
    "a tie of an ancestor's buffer": (
        *(
            "relora_core/low_rank/ties.py",
            '("_parameters", "_buffers"):  # not',
            '("_parameters",):  # not',
        ),
        "tests/core/low_rank/test_ties.py",
    ),
    "tied factors are redrawn together": (
        *("relora_core/restart.py", "if len(owners.of(factor)) > 1:", "if False:"),
        "tests/core/low_rank/test_ties.py",
    ),
    "a merge does not look for ties": (
        *(
            "relora_core/sites/site.py",
            '    refuse_ties({f"{name}.{site.tensor_name}": site.owner for name, site in sites})\n',
            "",
        ),
        "tests/core/low_rank/test_ties.py",
    ),
    "hooks of W are dropped": (
        *("relora_core/low_rank/candidates.py", "    if has_hooks(base):", "    if False:"),
        "tests/core/sites/test_targets.py",
    ),
    "an expanded weight is factored": (
        *(
            "relora_core/low_rank/parametrization.py",
            "if overlaps_itself(local(base.detach())):",
            "if False:",
        ),
        "tests/core/sites/test_targets.py",
    ),
    "a flat vector is no copy": (
        *("relora_core/optim/copies.py", "        if flat:\n", "        if False:\n"),
        "tests/core/optim/test_copies.py",
    ),
    "a vector for each parameter is no copy": (
        *("relora_core/optim/copies.py", "and alike >= self.each", "and False"),
        "tests/core/optim/test_copies.py",
    ),
    "any tensor of a factor's shape is a copy": (
        *(
            "relora_core/optim/copies.py",
            "if 2 * len(found) >= max(len(self.matrices), 1):",
            "if found:",
        ),
        "tests/core/optim/test_copies.py",
    ),
    "views of the parameters are copies": (
        *("relora_core/optim/copies.py", "if not memory.of(t)]", "]"),
        "tests/core/optim/test_copies.py",
    ),
    "copies in closures are passed over": (
        *("relora_core/low_rank/reach.py", "for cell in one.__closure__ or ()", "for cell in ()"),
        "tests/core/optim/test_copies.py",
    ),
    "a wrapper's copies in the state of what is in it are left": (
        *(
            "relora_core/optim/layouts.py",
            "copies=(*layout.copies, *beside)",
            "others=tuple(beside)",
        ),
        "tests/core/optim/test_copies.py",
    ),
    "sites that are all hidden are idle in silence": (
        *("relora_core/restart.py", "and not hidden)", ")"),
        "tests/core/sites/test_derived.py",
    ),
    "an average from before the sites goes by place": (
        *(
            "relora_core/sites/averages.py",
            "AveragedModel.update_parameters = _update_merged",
            "_unused = _update_merged",
        ),
        "tests/core/sites/test_averages.py",
    ),
    "a restart that was broken off does not travel": (
        *(
            "relora_core/low_rank/parametrization.py",
            "        if self.restarting is not None:\n",
            "        if False:\n",
        ),
        "tests/core/test_broken_off.py",
    ),
    "a torn site is saved": (
        *(
            "relora_core/low_rank/parametrization.py",
            "        self._refuse_torn(self.name)\n        restart = self.restart",
            "        restart = self.restart",
        ),
        "tests/core/test_broken_off.py",
    ),
    "a registration draws from the global generator": (
        *(
            "relora_core/low_rank/ties.py",
            "nn.Parameter(torch.empty(1))",
            "nn.Parameter(torch.randn(1))",
        ),
        "tests/core/sites/test_targets.py",
    ),
    "sites that were made stay if one cannot be": (
        *(
            "relora_core/sites/targets.py",
            "            undo.callback(",
            "            (lambda *a, **k: 0)(",
        ),
        "tests/core/sites/test_targets.py",
    ),
    "a gradient that no step has used is none": (
        *("relora_core/restart.py", "if not was_stepped(grad)]", "if False]"),
        "tests/core/sites/test_derived.py",
    ),
    "a used gradient outlives a restart": (
        *("relora_core/restart.py", "            grad.zero_()\n", "            pass\n"),
        "tests/core/sites/test_derived.py",
    ),
    "copies in an optimizer's attribute are passed over": (
        *(
            "relora_core/optim/moments.py",
            "        refuse_copies(layers_of(outer), params)\n",
            "        pass\n",
        ),
        "tests/core/optim/test_copies.py",
    ),
    "an average of W, A and B apart": (
        *("relora_core/sites/averages.py", "yield site.merged()", "yield found"),
        "tests/core/sites/test_averages.py",
    ),
    "an export looks for sites by name": (
        *("relora_core/files/weights.py", "    if missed:\n", "    if False:\n"),
        "tests/core/files/test_exports.py",
    ),
    "a merge that was broken off is not told": (
        *("relora_core/low_rank/parametrization.py", "        self.torn = True\n", ""),
        "tests/core/test_broken_off.py",
    ),
    "a restart that is finished begins anew": (
        *(
            "relora_core/restart.py",
            "        if site.restart == numbers[name] or norms[name]:\n",
            "        if True:\n",
        ),
        "tests/core/test_broken_off.py",
    ),
    "an estimate's processes tell of Ctrl-C, each": (
        *(
            "reference_trainer/bench/estimate/command.py",
            "initializer=signal.signal",
            "initializer=None",
        ),
        "tests/trainer/test_command_line.py",
    ),
}


@pytest.mark.parametrize("fault", BREAKAGES)
def test_there_is_one_place_for_it(fault):
    file, sound, _, tests = BREAKAGES[fault]
    found = (ROOT / file).read_text().count(sound)
    assert found == 1, f"{sound!r} stands {found} times in {file}"
    assert (ROOT / tests).exists()


@pytest.mark.slow
@pytest.mark.parametrize("fault", BREAKAGES)
def test_the_suite_notices(fault, tmp_path):
    file, sound, broken, tests = BREAKAGES[fault]
    for name in ("relora_core", "reference_trainer", "tests", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    broken_file = tmp_path / file
    broken_file.write_text(broken_file.read_text().replace(sound, broken))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", tests],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1, run.stdout[-3000:]
    assert "failed" in run.stdout
