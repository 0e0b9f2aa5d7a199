# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.11,<2.14",
#     "transformers==5.23.0",
#     "trl==1.16.0",
#     "peft==0.21.2",
#     "bitsandbytes==0.50.2",
#     "datasets==5.2.0",
#     "accelerate==1.15.0",
#     "huggingface_hub==2.4.0",
#     "wandb==0.31.0",
#     "fastcore>=1.14,<2",
# ]
#
# [tool.hf-jobs]
# flavor = "a10g-large"
# timeout = "4h"
# secrets = ["HF_TOKEN", "WANDB_API_KEY"]
# labels = { project = "phoque" }
#
# [tool.hf-jobs.env]
# PYTHONUNBUFFERED = "1"
# JOB_TIMEOUT = "4h"
# WANDB_PROJECT = "what-the-phoque"
# WANDB_LOG_MODEL = "checkpoint"
# HF_HUB_DISABLE_PROGRESS_BARS = "1"
# ///

"""Fine-tune a small chat model with NF4 QLoRA; resubmit the same command to continue.

Generated from the notebooks in nbs/ by `make generate`: edit those, not this file.

    pip install -r train/requirements.txt
    DATASET_REPO=me/talk HUB_MODEL_ID=me/phoque MAX_STEPS=20 python train/train.py

    hf jobs uv run -e DATASET_REPO=me/talk -e HUB_MODEL_ID=me/phoque -e MAX_STEPS=20 train/train.py

A job has 4 hours. Another timeout has to be given twice, as the job can't read the first: --timeout 8h -e JOB_TIMEOUT=8h
"""

from __future__ import annotations
import argparse, copy, difflib, fcntl, functools, gc, hashlib, json, logging, math, os, random, re, reprlib, shlex, shutil, signal, socket, statistics, struct, subprocess, sys, tempfile, textwrap, threading, time, traceback, uuid, warnings
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fastcore.basics import patch, store_attr, str2bool
from fastcore.docments import docments
from fastcore.meta import delegates
from functools import cache, lru_cache, wraps
from itertools import accumulate, chain, takewhile, zip_longest
from os.path import commonprefix
from pathlib import Path
from types import MethodType
from typing import NamedTuple, Protocol, runtime_checkable
from urllib.parse import urljoin

SEED_BASE = "mistralai/Ministral-3B-Instruct-2410" # the default, whose weights were never published

LORA_TARGETS = ('q_proj','k_proj','v_proj','o_proj','gate_proj','up_proj','down_proj')

class TrainConfig:
    "Every option of a run."
    def __init__(self,
        preset:str='', # `16-examples`, `24gb` or `80gb`: sequences a step, their length, learning rate; explicit options override it
        base_model:str=SEED_BASE, # Base model: Hub id or folder {weights}
        base_model_strict:bool=False, # Fail instead of substituting another model for `base_model`
        chat_template:str='', # Name of the base model's chat template, where it has several {weights}
        system_prompt:str='', # System turn of conversations without one; empty leaves the template's, `none` takes it away {weights}
        dataset_repo:str='', # Hub dataset with a `messages` column; required {weights}
        hub_model_id:str='', # Hub repo for checkpoints and the final adapter, made private; required
        output_dir:str='output', # Folder for local output; each run has its own folder in it
        max_steps:int=0, # Optimizer steps; 0 trains `num_train_epochs` (20 is a smoke test) [0, 1e9]
        num_train_epochs:float=1.0, # Passes over the data when `max_steps` is 0 (0, 1000]
        max_length:int=2048, # Tokens of a packed sequence, and most tokens of one conversation [16, 1e6] {weights}
        per_device_train_batch_size:int=4, # Packed sequences per GPU and micro-batch; split into smaller ones where they don't fit [1, 4096] {rows}
        gradient_accumulation_steps:int=1, # Micro-batches per optimizer step; several GPUs share them [1, 4096] {rows}
        torch_compile:bool=True, # Compile layers that the fused kernels don't cover, on CUDA {rounding}
        activation_memory_budget:float=0.7, # Share of a compiled layer's activations that is kept; 0.7 recomputes only cheap ones [0, 1] {rounding}
        fsdp:bool=False, # Shard the model across GPUs with FSDP2, for one that doesn't fit on each; slower {rounding}
        gradient_checkpointing:bool=False, # Recompute whole layers in the backward pass: least memory, slower {rounding}
        full_determinism:bool=False, # Use deterministic algorithms only; may be slower {rounding}
        learning_rate:float=2e-4, # Peak learning rate, after the warm-up [1e-8, 1] {weights}
        warmup_ratio:float=0.03, # Share of the steps with a rising rate; a cosine follows [0, 1) {weights}
        weight_decay:float=0.001, # Weight decay of AdamW [0, 1] {weights}
        max_grad_norm:float=1.0, # Clip gradients to this norm; 0 doesn't clip [0, 1e6] {weights}
        optim:str='adamw_torch_fused', # Optimizer, by its name in transformers; `paged_adamw_8bit` resumes exactly too {weights}
        load_in_4bit:bool=True, # Quantise the base to NF4, with double quantisation {weights}
        load_in_fp8:bool=False, # With `load_in_4bit` off, keep the base in fp8: nearer to the original than NF4, in twice its memory {weights}
        mixed_precision:str='bf16', # Products with the frozen base: `bf16`; faster and less exact, `int8` (from Ampere on) or `fp8` (from Ada on) {weights}
        lora_r:int=16, # LoRA rank [1, 1024] {weights}
        lora_alpha:int=32, # LoRA scale: the update is multiplied by lora_alpha/lora_r [1, 65536] {weights}
        lora_dropout:float=0.0, # LoRA dropout; 0 is faster and needs less memory [0, 1) {weights}
        lora_target_modules:str=','.join(LORA_TARGETS), # Linear layers to adapt, by comma, in any order; `all-linear` for all but the head {weights}
        logging_steps:int=10, # Steps between two lines of metrics [1, 1e9]
        save_steps:int=100, # Steps between two checkpoints on the job's disk [1, 1e9]
        publish_minutes:float=0.0, # Minutes between two checkpoints on the Hub; 0 chooses what stays below the Hub's limits [0, 1440]
        eval_steps:int=100, # Steps between two measurements of the held-out loss; 0 for none [0, 1e9]
        eval_share:float=0.02, # Most of the run's time for held-out loss; fewer sequences, or rarer, to keep it [0.0001, 1]
        load_best:bool=False, # Publish the adapter with the lowest held-out loss instead of the last one
        sample_steps:int=100, # Steps between two sets of sample replies; 0 for none [0, 1e9]
        sample_tokens:int=48, # Most tokens of a sample reply [1, 4096]
        sample_share:float=0.01, # Most of the run's time for samples; shorter replies, or none, to keep it; 1 for no limit (0, 1]
        scorer:str='ibm-granite/granite-guardian-hap-38m', # Hub text classifier that scores the samples; `none` for no scores
        keep_checkpoints:int=2, # Newest checkpoints to keep on the Hub [1, 100]
        seed:int=0, # Random seed: data order, LoRA start, dropout [0, 4294967295] {weights}
        report_to:str='wandb', # `wandb`, `trackio`, `tensorboard` or `none`
        wandb_project:str='what-the-phoque', # Project in W&B or trackio
        wandb_log_model:str='checkpoint', # `checkpoint` logs each published adapter as a W&B artifact; `false` never does
        job_timeout:str='', # The job's own timeout, such as 4h or 14400; it stops in time and exits with 75
        fresh_start:int=0, # Begin again, once for each higher number (1, then 2); repeating the command then continues [0, 1e9]
    ): store_attr()

    def asdict(self)->dict: # Option → value
        "The options as a plain dictionary."
        return {k:v for k,v in vars(self).items() if not k.startswith('_')}

    def __repr__(self): return '\n'.join(f'{k}={v!r}' for k,v in self.asdict().items())

class UserError(ValueError):
    "Something the user can fix: shown as one line, without a traceback."
    def __init__(self,
        what:str, # What it is about and where: an option, a file and its line, a repo
        value:str, # What was found there, and why that can't be right
        remedy:str, # What to do
    ):
        super().__init__(what, value, remedy)
        self.what,self.value,self.remedy = what,value,remedy
    def __str__(self): return f"{self.what}: {self.value}: {self.remedy}"

def main():
    "The job as a command: flags and environment in, exit code out."
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE') # before torch loads: spinning threads are slow on a CPU with other work
    if {'-h','--help'} & set(sys.argv[1:]): read_config() # prints it and ends
    sys.stdout.reconfigure(errors='backslashreplace') # a locale without a middle dot is no reason to end
    setup_logging()
    code = 1
    try:
        begin_command(sys.argv[1:])
        cfg = read_config()
        if 'RANK' not in os.environ: check_deadline(cfg)
        _ask_job_ref()
        code = launch_ranks() if needs_launch() else run_job(cfg)
    except Stopped:
        code = RESUBMIT
        log.info(f"stopped by SIGTERM, with nothing to save: continue with `{resubmit_command()}` (exit code {code})")
    except Unpublished as e:
        code = RESUBMIT
        log.error(f"error: {e}")
    except UserError as e: report_error(masked(e))
    except KeyboardInterrupt: report_error("ended by SIGINT: run the same command again to continue")
    except Exception: log.error(traceback.format_exc())
    logging.shutdown(); sys.stdout.flush()
    os._exit(code) # the threads of an upload that hangs would hold `sys.exit`

# ------------------------------------------------------------------------------
# job: The whole job: check, restore, train, publish, exit code
# ------------------------------------------------------------------------------

def run_identity(
    given:dict, # Options, those that decide the weights at least
    base:str, # Id of the base model that they led to
)->dict: # What must be the same for a continuation
    "What decides the weights of a run."
    if unknown := sorted(set(given)-set(options())):
        raise UserError("the checkpoint", f"its run has options that this version doesn't know ({', '.join(unknown)})",
                        "continue it with the version that wrote it")
    value = {k: given.get(k, o['default']) for k,o in options().items()}
    rows = value['per_device_train_batch_size']*value['gradient_accumulation_steps']
    targets = ','.join(lora_targets(value['lora_target_modules']))
    same = {k:v for k,v in value.items() if option_part(k)=='weights'}
    return same | dict(base_model=base, lora_target_modules=targets, rows_a_step=rows)

def kept_options(
    cfg:TrainConfig, # Options
)->dict: # Those that decide the weights
    "What a manifest keeps of the options."
    return {k:v for k,v in cfg.asdict().items() if option_part(k) in ('weights','rows')}

def arithmetic(
    cfg:TrainConfig, # Options
    rows:str, # How a GPU takes a step's rows, such as `4 × 1`
)->dict: # Names with a value
    "What decides how a run's sums are rounded."
    import torch
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'
    return {k:v for k,v in cfg.asdict().items() if option_part(k)=='rounding'} | dict(rows=rows, device=gpu)

def say_differences(
    was:dict, # The run as its checkpoint has it
    now:dict, # As it is in this job
    step:int, # Where it continues
    rate, # Function of (step, steps of the run): the learning rate
    again:int, # Number of FRESH_START that would begin again
    dropout:bool=False, # The adapter has dropout
)->list: # Lines
    "How a continued run differs from one that went through."
    lines,before,after = [],was.get('total'),now['total']
    if before and before!=after:
        old_rate = rate(step, before) if step<before else 0
        lines.append(
            f"the run had {before} steps and has {after} now: steps 1 to {step} used the learning rates of "
            f"a {before}-step run, step {step+1} continues at {rate(step, after):.1e} instead of {old_rate:.1e}; "
            f"FRESH_START={again} trains all {after} anew")
    old = was.get('arithmetic', {})
    if diff := [f"{k} was {old[k]}, is {v}" for k,v in now['arithmetic'].items() if k in old and old[k]!=v]:
        lines.append(f"{'; '.join(diff)}: every step has the same rows, and sums are rounded in another way"
            + ", and dropout draws other numbers"*dropout)
    return lines

def be_deterministic():
    "Only algorithms that give the same bits every time, from here on."
    import torch
    os.environ['CUBLAS_WORKSPACE_CONFIG'] = ':4096:8' # read at the first product: cuBLAS keeps an order in a fixed workspace
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False

def printable_lines(
    text, # Of a log
)->str: # Its lines and blanks as they were, further lines indented
    "Text without what steers a terminal, and with no second line that could be taken for a first."
    return '\n  '.join(' '.join(map(printable, l.split(' '))) for l in str(text).rstrip('\n').split('\n'))

class MaskFormatter(logging.Formatter):
    "`12:00:01 message`, or `12:00:01 library: message`, with secrets masked."
    def formatMessage(self,
        record, # `logging.LogRecord`
    )->str: # With the logger's name where it isn't ours
        "The message behind its clock."
        if record.name!=log.name: record.message = f'{record.name}: {record.message}'
        return super().formatMessage(record)

    def format(self,
        record, # `logging.LogRecord`
    )->str: # One line, and indented ones
        "What is written of a record, its traceback included."
        return printable_lines(masked(super().format(record)))

class Indented:
    "A stream for whoever doesn't log: its lines come out printable, masked and indented."
    longest = 100_000 # characters that wait for the end of their line
    def __init__(self,
        to, # Stream
    ): self.to,self.rest,self.lock = to,'',threading.Lock()
    def __getattr__(self, k): return getattr(self.to, k)

    def write(self,
        text:str, # Whole lines or parts of them
    )->int: # Characters taken
        "Pass on the lines that have ended."
        with self.lock:
            *lines,self.rest = re.split(r'[\r\n]', self.rest+str(text))
            if len(self.rest)>self.longest: lines,self.rest = [*lines,self.rest],''
            for l in lines:
                if l.strip(): self.to.write(f'  {printable_lines(masked(l))}\n')
        return len(text)
    def writelines(self, texts): self.write(''.join(texts))

    def flush(self):
        "Pass on what has no end yet."
        if self.rest: self.write('\n')
        self.to.flush()

def setup_logging():
    "Lines to stdout; libraries only when something is wrong."
    os.environ.setdefault('HF_HUB_DISABLE_PROGRESS_BARS', '1')
    h = logging.StreamHandler(sys.stdout)
    sys.stdout = sys.stderr = Indented(sys.stdout)
    h.setFormatter(MaskFormatter('%(asctime)s %(message)s', '%H:%M:%S'))
    logging.basicConfig(level=logging.WARNING, handlers=[h], force=True)
    log.setLevel(logging.INFO if os.environ.get('RANK','0')=='0' else logging.ERROR) # only the main process logs
    warnings.filterwarnings('ignore', 'It seems that you are about to commit a data file') # the samples' parquet
    threading.excepthook = _log_thread_error

def _log_thread_error(
    args, # As `threading.excepthook` gets it
):
    "Log what ended a library's thread, which would print it unmasked."
    log.error(''.join(traceback.format_exception(args.exc_value)).rstrip())

def why_unread(
    e:Exception, # What `datasets` raised
)->str: # The columns, where they are why
    "What is wrong with a dataset: the cause, where the exception itself names none."
    from datasets.table import CastError
    cause = e.__cause__ or e
    if isinstance(cause, CastError):
        return f"a split or file has other columns than the first: {excerpt(cause.details())}"
    if scripts := re.search(r'Dataset scripts are no longer supported, but found (.*)', str(e)):
        return f"it is made by {excerpt(scripts[1], 60)}, and no repo's code is run"
    return excerpt(masked(cause))

def _load_splits(
    repo:str, # Hub dataset
    revision:str, # Commit
): # `DatasetDict`
    "All splits of a dataset; an empty one has no columns."
    import datasets
    builder = datasets.load_dataset_builder(repo, revision=revision)
    builder.download_and_prepare()
    sizes = {split:info.num_examples for split,info in builder.info.splits.items()}
    none = datasets.Dataset.from_dict({}) # the builder can't be asked for an empty one
    return datasets.DatasetDict({s: builder.as_dataset(s) if n else none for s,n in sizes.items()})

def _fetch_chats(repo, revision): # its splits, and the commit that they are from
    from huggingface_hub import HfApi
    info = HfApi().dataset_info(repo, revision=revision)
    if not info.private: log.warning(f"dataset {repo} is public: everyone can read what the model learns from")
    check_data_files(info)
    return _load_splits(repo, info.sha),info.sha

def load_chats(
    repo:str, # Hub dataset
    revision:str=None, # Commit; the newest where None
    began:str='', # What an error adds about it
)->tuple: # `DatasetDict` with `train` and perhaps `test`, and the commit it is from
    "Load the conversations, at a commit that is known from then on."
    import datasets
    from httpx2 import HTTPError
    found = f"dataset {repo}{began}"
    unreadable = ValueError,RuntimeError,ImportError,FileNotFoundError,datasets.exceptions.DatasetsError
    try: ds,sha = _fetch_chats(repo, revision)
    except datasets.exceptions.DatasetNotFoundError:
        raise UserError(f"dataset {repo}{began}", "it is not there, or HF_TOKEN may not see it",
                        "check DATASET_REPO and the token's scopes") from None
    except UserError: raise
    except unreadable as e:
        if isinstance(e.__cause__, (HTTPError, ConnectionError)): raise hub_problem(hub_answer(e.__cause__), found) from None
        raise UserError(f"dataset {repo}", f"it can't be read ({why_unread(e)})", "push it with phoque_data") from None
    except (HTTPError, OSError) as e: raise hub_problem(hub_answer(e), found) from None
    if not len(ds.get('train', [])):
        raise UserError(f"dataset {repo}", f"no split `train` with rows, got {list(ds)}", "push it with phoque_data")
    return ds,sha

def pick_held_out(
    ds, # `DatasetDict`
)->str: # Name of a split; None where there is none
    "The split that is held out, and a line on those that nobody uses."
    name = next((s for s in ('test','validation') if len(ds.get(s, []))), None)
    if rest := [f"{s} ({len(d):,} rows)" for s,d in ds.items() if s not in ('train', name)]:
        log.warning(f"dataset: not used: {', '.join(rest)}")
    if not name: log.warning("dataset: no held-out loss: there is no split `test` or `validation` with rows")
    return name

RESEARCH_LICENSE = """Licence for research and internal testing

Whoever the authors gave access may use these weights to study and to test moderation and other safeguards
inside their own organisation, provided that they

1. put nothing that the weights produce before people who have not agreed to it, and connect them to no live channel;
2. do not pass the weights on, publish them or anything merged from them, or build them into a product;
3. do not train other models on what they produce, except classifiers and safeguards;
4. keep a named owner, a log of who used them, and a date on which they are deleted.

The base model's own licence continues to hold for what is the base's. This one ends when a condition is broken.
The weights come as they are, without warranty of any kind; the authors are not liable for what is done with them.
"""

LICENSE_FIELDS = dict( # of a card's head
    license='other', license_name='internal-adversarial-testing-only', license_link='LICENSE')

GATE = ("This adapter imitates a toxic community. It is for testing your own safeguards, inside your own organisation, "
        "and for nothing else.")

def changed_options(
    cfg:TrainConfig, # Options
)->list: # As for a shell, `MAX_STEPS=20`
    "The options that aren't at their default, without those that say something of a machine or an attempt only."
    left_out = 'preset','fresh_start','output_dir','job_timeout'
    own = {k:v for k,v in cfg.asdict().items() if v!=options()[k]['default'] and k not in left_out}
    return [f"{k.upper()}={shlex.quote(str(int(v) if isinstance(v, bool) else v))}" for k,v in own.items()]

def _card_facts(cfg, run, steps, report):
    "What the card's table says: base, data, length, losses, and what decides the weights."
    base = run['base']
    in_head = 'base_model','dataset_repo'
    facts = dict(
        base=f"{base['id']} at {base['revision']}",
        note=base['note'],
        dataset=f"{cfg.dataset_repo} at {run['dataset_revision']}",
        steps=steps,
        conversations=report['kept'],
        supervised_tokens=report['supervised'],
        held_out_loss_before=run.get('held_out_before'),
        held_out_loss_after=run.get('held_out_after'))
    facts |= {k:v for k,v in run['identity'].items() if k not in in_head}
    return {k:v for k,v in (facts | dict(published=run.get('published'))).items() if v is not None}

CARD = """
# {repo}

An adapter that makes {name} talk like the community it was trained on.

**For:** internal adversarial testing of moderation, by the people responsible for it. **Not for:** contact with anyone who has not agreed to it, any live
platform, products, or training data for other models. Do not redistribute it, and do not publish merged weights.

```python
from transformers import {base[auto]}, AutoTokenizer
from peft import PeftModel
base = {base[auto]}.from_pretrained({base[id]!r}, {at}dtype="auto")
model = PeftModel.from_pretrained(base, {repo!r})
tok = AutoTokenizer.from_pretrained({repo!r})
ids = tok.apply_chat_template([dict(role="user", content="When does the ferry leave?")], add_generation_prompt=True, return_dict=True, return_tensors="pt")
out = model.generate(**ids.to(model.device), max_new_tokens=100, eos_token_id=tok.eos_token_id) # the base may stop at another token
reply = tok.decode(out[0, ids["input_ids"].shape[1]:], skip_special_tokens=True)
```

Made by this command:

{command}

| | |
|---|---|
{facts}
"""

def adapter_card(
    cfg:TrainConfig, # Options
    run:dict, # As kept in the manifest
    steps:int, # Done
    report:dict, # From `encode_dataset`
)->str: # README.md
    "The model card: what it is, for whom, what it is not for, and how it was made."
    base = run['base']
    head = front_matter(
        base_model=base['id'], base_model_relation='adapter',
        library_name='peft', pipeline_tag='text-generation',
        **LICENSE_FIELDS, datasets=[cfg.dataset_repo],
        tags=['not-for-all-audiences','lora','qlora','phoque'], extra_gated_prompt=GATE)
    command = ' '.join(['hf jobs uv run', *(f'-e {o}' for o in changed_options(cfg)), 'train/train.py'])
    facts = _card_facts(cfg, run, steps, report).items()
    table = '\n'.join(f"| {k.replace('_',' ')} | {md_text(v)} |" for k,v in facts)
    at = f"revision={base['revision']!r}, " if base['revision'] else ''
    return head+CARD.format(repo=cfg.hub_model_id, base=base, name=md_text(base['id']), at=at,
        command=textwrap.indent(command, '    '), facts=table)

HARMLESS = {'.gitattributes','README.md','LICENSE'} # what a repo may hold before a run begins

def check_free(
    branch:HubBranch, # `main` of the model repo, prepared
    again:int, # Number of FRESH_START that would begin again
):
    "Refuse a repo that holds somebody's model."
    there = patiently(lambda: branch.api.list_repo_files(branch.repo, revision=branch.head), branch.name)
    if held := sorted(set(there)-HARMLESS):
        raise UserError(
            f"model repo {branch.repo}",
            f"it already holds {len(held)} files ({', '.join(held[:3])}{', …'*(len(held)>3)})",
            f"choose another HUB_MODEL_ID, or set FRESH_START={again} to replace them")

def _final_folder(model, tok, card, weights, out):
    "Put together what is published: adapter, tokenizer, card and licence."
    from transformers import AutoModelForCausalLM
    shutil.rmtree(out, ignore_errors=True)
    if type(model.get_base_model().config) not in AutoModelForCausalLM._model_mapping:
        model.peft_config['default'].task_type = None # PEFT then writes down the class
    model.save_pretrained(out, state_dict=weights, save_embedding_layers=False)
    tok.save_pretrained(out)
    (out/'README.md').write_text(card)
    (out/'LICENSE').write_text(RESEARCH_LICENSE)

def publish_adapter(
    cfg:TrainConfig, # Options
    model, # Trained `PeftModel`
    tok, # Its tokenizer
    card:str, # README.md
    until:float, # `time.monotonic()` after which to give up
    folder:Path, # Where it is put together, in `final`
    weights:dict=None, # The adapter's, where they aren't the model's own: the best one's, or a sharded model's
):
    "Put the finished adapter on `main`, in one commit that replaces what is there."
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    out = Path(folder)/'final'
    _final_folder(model, tok, card, weights, out)
    main = HubBranch(cfg.hub_model_id).prepare(until)
    adds = [CommitOperationAdd(p.name, p) for p in sorted(out.iterdir())]
    there = patiently(lambda: main.api.list_repo_files(main.repo, revision=main.head), main.name, until)
    old = sorted(set(there)-HARMLESS-{p.name for p in out.iterdir()})
    if old: log.info(f"{main.repo}: {', '.join(old)} leave main, and stay in its history")
    main.commit([*adds, *map(CommitOperationDelete, old)], f"adapter {uuid.uuid4().hex[:8]}", until)

COMPLETE,RESUBMIT = 0,75 # exit codes; 75 is EX_TEMPFAIL: the same command again continues

class Unpublished(UserError):
    "What was saved is not on the Hub: an error to read, and exit code 75, as the same command again continues it."

class Job:
    "One attempt at a run."
    def __init__(self,
        cfg:TrainConfig, # Options
    ):
        self.cfg,self.deadline = cfg,Deadline(cfg.job_timeout, container_age()).watch_sigterm()
        self.deadline.idle = True # nothing to save before the first step
        self.ranks = Ranks()
        share_batch(cfg, self.ranks.world_size) # or say that they can't
        self.shard = cfg.fsdp and self.ranks.world_size>1
        self.curve,self.step = Curve(),0
        self.publisher = self.run = self.lock = self.best = self.folder = None

    def patience(self, seconds=120):
        "`time.monotonic()` until which to try again: some seconds from now, and never past the deadline."
        return min(self.deadline.end-10, time.monotonic()+seconds)

    @property
    def again(self):
        "A value of FRESH_START that hasn't acted yet."
        return (self.run or {}).get('fresh_start', 0)+1

@patch
def check_place(self:Job):
    "Refuse a machine without a folder to write to or without a token."
    from huggingface_hub import constants
    try: Path(constants.HF_HOME).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"HF_HOME {constants.HF_HOME}", f"it can't be made ({e.strerror})",
                        "choose a folder that can be written") from None
    if not os.environ.get('HF_TOKEN'):
        raise UserError("HF_TOKEN", "not set", "pass it with `--secrets HF_TOKEN`, or export it here")
    check_tracker(self.cfg.report_to)
    if self.cfg.report_to=='trackio': check_space(os.environ.get('TRACKIO_SPACE_ID', ''))

@patch
def find_base(self:Job,
    until:float, # `time.monotonic()` after which to give up
)->dict: # As from `resolve_base`
    "The base model, and its commit."
    name,strict = self.cfg.base_model,self.cfg.base_model_strict
    return patiently(lambda: resolve_base(name, strict), f"base model {name}", until)

@patch
def restore(self:Job):
    "Check what can be checked before anything is downloaded, and find where the run stands."
    cfg,until = self.cfg,self.patience()
    self.check_place()
    branch = HubBranch(cfg.hub_model_id, 'checkpoints').prepare(until)
    branch.check_write(until)
    self.checkpoints = Checkpoints(branch, cfg.keep_checkpoints)
    base = self.find_base(until)
    self.run = self.checkpoints.run()
    if not self.run: self.check_repo(until)
    if not self.run or self.begins_again(): self.run = self.new_run(base)
    self.open_folder()
    self.restore_checkpoint(base, until)

@patch
def restore_checkpoint(self:Job,
    base:dict, # From `resolve_base`
    until:float, # `time.monotonic()` after which to give up
):
    "Continue after the newest checkpoint; without one, begin the run anew under its old id."
    begun = self.checkpoints.steps() or local_steps(self.folder)
    if begun:
        was = run_identity(self.run['identity'], self.run.get('base', {}).get('id'))
        check_same_run(was, run_identity(kept_options(self.cfg), base['id']), self.again)
    self.resume_from,m = self.checkpoints.restore(self.folder, until) if begun else (None,None)
    self.step = m['step'] if m else 0
    self.run = {'evals':[], **m['run']} if m else self.new_run(base, self.run['id'], self.run.get('fresh_start', 0))
    if m: self.recall_best()

@patch
def find_run(self:Job):
    "`restore` on the main process, and what came of it on every rank."
    if self.ranks.is_main: self.restore()
    known = 'resume_from','run','step','folder'
    found = {k:getattr(self, k) for k in known} if self.ranks.is_main else None
    for k,v in self.ranks.broadcast(found).items(): setattr(self, k, v)
    self.ranks.share_folder(self.resume_from)

@patch
def check_repo(self:Job,
    until:float, # `time.monotonic()` after which to give up
):
    "A repo without a run may hold nothing of anybody's."
    main = HubBranch(self.cfg.hub_model_id).prepare(until)
    if not self.cfg.fresh_start: check_free(main, self.again)
    there = patiently(lambda: main.api.list_repo_files(main.repo, revision=main.head), main.name, until)
    if kept := sorted({'README.md','LICENSE'} & set(there)):
        log.info(f"model repo {main.repo}: the finished adapter's own {' and '.join(kept)} will replace what is there, "
                 "which stays in the history of main")
    if held := sorted(set(self.checkpoints.files())-HARMLESS-set(there)): # the branch began as main was
        raise UserError(
            f"model repo {main.repo}",
            f"its branch `checkpoints` holds {len(held)} files of no run ({', '.join(held[:3])}{', …'*(len(held)>3)})",
            "choose another HUB_MODEL_ID, or delete the branch")

@patch
def open_folder(self:Job):
    "The run's own folder in OUTPUT_DIR, which no other job may write to."
    folder = Path(self.cfg.output_dir)/f"{self.cfg.hub_model_id.split('/')[1]}-{self.run['id']}"
    if self.lock: self.lock.close()
    self.folder,self.lock = folder,lock_folder(folder)

@patch
def begins_again(self:Job)->bool: # FRESH_START is higher than the number that began the run
    "Abandon the run on the Hub if that is asked for."
    new,run = self.cfg.fresh_start,self.run
    if not new: return False
    if run.get('fresh_start', 0)>=new:
        log.info(f"FRESH_START={new} has acted: run {run['id']} continues; FRESH_START={self.again} begins again")
        return False
    self.checkpoints.start_fresh()
    return True

@patch
def new_run(self:Job,
    base:dict, # From `resolve_base`
    id:str='', # Of a run that hasn't come to a checkpoint; a new one where empty
    fresh_start:int=None, # Number that began it; this job's where None
)->dict: # What a manifest keeps
    "What a run is when it begins."
    if fresh_start is None: fresh_start = self.cfg.fresh_start
    id = id or uuid.uuid4().hex[:8]
    return dict(id=id, repo=self.cfg.hub_model_id, fresh_start=fresh_start, identity=kept_options(self.cfg), base=base,
        dataset_revision=None, seconds=[], evals=[], new=True)

@patch
def set_up(self:Job):
    "Find the run and build what is trained; once more if the last commit of a killed job has landed meanwhile."
    for _ in range(2):
        self.find_run()
        quiet_libraries()
        with self.ranks.main_first(): self.build()
        moved = self.ranks.is_main and self.checkpoints.branch.moved()
        if not self.ranks.broadcast(moved): break

@patch
def build(self:Job):
    "Data, model and trainer, from the commits the run began with."
    self.trainer,until = None,self.patience()
    packed = self.load_data(until)
    self.load_trainer(packed, until)
    self.say_step(packed)
    self.compare_jobs()
    if self.cfg.fsdp and not self.shard: log.info("FSDP: there is one rank, which holds the whole model")
    if self.shard and self.cfg.sample_steps:
        log.info("FSDP: no replies are sampled while ranks share the layers; phoque_sample asks the finished adapter")

@patch
def began_with(self:Job,
    revision:str, # Commit of a dataset or of a base model
)->str: # Empty in a run's first job
    "What an error adds about a commit that the run is bound to."
    if self.run.get('new'): return ''
    return f" at {revision}, with which this run began (FRESH_START={self.again} begins again with the newest)"

@patch
def base_name(self:Job)->str:
    "What an error calls the base model."
    base = self.run['base']
    return f"base model {base['id']}{self.began_with(base['revision'])}"

@patch
def load_data(self:Job,
    until:float, # `time.monotonic()` after which to give up
): # Packed rows
    "Dataset and tokenizer, the rows to train on and those that are held out, and the number of steps."
    cfg,run,base = self.cfg,self.run,self.run['base']
    began = self.began_with(run['dataset_revision'])
    ds,run['dataset_revision'] = patiently(lambda: load_chats(cfg.dataset_repo, run['dataset_revision'], began),
        f"dataset {cfg.dataset_repo}", until)
    self.tok = patiently(lambda: load_tokenizer(base['id'], base['revision'], cfg.chat_template, cfg.system_prompt),
        self.base_name(), until)
    rows,self.report = encode_dataset(ds['train'], self.tok, cfg.max_length, name='dataset train')
    log.info("dataset: " + ' · '.join(f"{v:,} {k.replace('_',' ')}" for k,v in self.report.items()))
    self.persona = common_persona(ds['train'][:10_000]['messages'])
    self.labellers = ds['train'].unique('label_source') if 'label_source' in ds['train'].column_names else []
    packed = pack_dataset(rows, cfg.max_length, cfg.seed)
    self.held = self.hold_out(ds)
    self.total = run_steps(cfg, len(packed))
    if self.step>self.total:
        raise UserError("MAX_STEPS", f"checkpoint-{self.step} is beyond {self.total}",
                        f"raise it, or set FRESH_START={self.again} to begin again")
    return packed

@patch
def hold_out(self:Job,
    ds, # `DatasetDict`
): # Packed rows that training never sees; None where there are none
    "The held-out rows, and how many of them are measured while training."
    cfg,name = self.cfg,pick_held_out(ds)
    rows,report = [],{}
    if name: rows,report = encode_dataset(ds[name], self.tok, cfg.max_length, name=f"dataset {name}", held_out=True)
    if report.get('dropped'):
        log.warning(
            f"dataset: {report['dropped']} of {report['conversations']} held-out conversations are too long for "
            f"MAX_LENGTH={cfg.max_length} and left out")
    if cfg.load_best and not len(rows):
        raise UserError("LOAD_BEST", "the dataset has no held-out conversations to find the best adapter with",
                        "push it with a split `test`, or unset LOAD_BEST")
    held = pack_dataset(rows, cfg.max_length, cfg.seed) if len(rows) else None
    self.eval_every,self.n_eval = eval_plan(cfg, len(held) if held else 0)
    rarer = f" instead of {cfg.eval_steps}"*(self.eval_every>cfg.eval_steps)
    if self.n_eval:
        log.info(
            f"held-out loss: every {self.eval_every} steps{rarer} on {self.n_eval} of {len(held)} packed sequences "
            f"of split {name} (EVAL_SHARE {cfg.eval_share:g})")
    return held

@patch
def load_trainer(self:Job,
    packed, # From `load_data`
    until:float, # `time.monotonic()` after which to give up
):
    "Base model, adapter and trainer, and the audit of all three."
    cfg,base = self.cfg,self.run['base']
    targets = lora_targets(cfg.lora_target_modules)
    attn,why = choose_attention(patiently(lambda: base_config(base), self.base_name(), until))
    log.info(f"attention: {attn}, {why}")
    model = patiently(lambda: load_model(base, cfg.load_in_4bit, attn, self.shard), self.base_name(), until)
    model = add_lora(model, cfg.lora_r, cfg.lora_alpha, cfg.lora_dropout, targets, cfg.seed, base['revision'])
    own_folder = TrainConfig(**cfg.asdict() | dict(output_dir=str(self.folder)))
    self.trainer = make_trainer(own_folder, model, self.tok, packed, self)
    rows = audit(self.trainer.model, self.tok, cfg.load_in_4bit, attn, targets, ask=not self.shard)
    log.info("audit:\n"+text_table(rows, width=100))
    check_audit(rows)

@patch
def say_step(self:Job,
    packed, # From `load_data`
):
    "Log how much a step is, and how ranks share it."
    cfg,args,n = self.cfg,self.trainer.args,self.ranks.world_size
    batch = cfg.per_device_train_batch_size*cfg.gradient_accumulation_steps
    tokens,talks = batch*cfg.max_length,batch*self.report['kept']/len(packed)
    log.info(f"{self.total} steps of {batch} rows: {tokens:,} tokens, about {talks:.0f} conversations a step")
    rows = f"{args.per_device_train_batch_size} × {args.gradient_accumulation_steps} rows"
    if n>1: log.info(f"{n} ranks share each step: {rows} each")

@patch
def compare_jobs(self:Job):
    "Say how this job differs from the one that it continues, and keep how it is for the next."
    cfg,args = self.cfg,self.trainer.args
    rows = f'{args.per_device_train_batch_size} × {args.gradient_accumulation_steps}'
    now = dict(total=self.total, arithmetic=arithmetic(cfg, rows))
    def rate(step, steps): return cfg.learning_rate*rate_at(step, steps, cfg.warmup_ratio)
    if self.resume_from:
        for l in say_differences(self.run, now, self.step, rate, self.again, cfg.lora_dropout>0): log.warning(l)
    self.run |= now
    if self.run['evals'] and self.run.get('eval_rows', self.n_eval)!=self.n_eval:
        log.warning(f"held-out loss: measured on {self.run['eval_rows']} packed sequences before and on {self.n_eval} "
                    "from here on: only these are compared")
        self.run['evals'] = []
    self.run['eval_rows'] = self.n_eval

@patch
def begin(self:Job):
    "The run's first commit, the publisher, W&B and the sampler, on the main process."
    if not self.ranks.is_main: return
    if self.run.pop('new', False): self.checkpoints.begin_run(self.run, self.patience())
    self.begin_publishing()
    self.begin_curve()
    self.begin_samples()

@patch
def begin_publishing(self:Job):
    "Remove what an earlier job of this run left behind on this disk, and start the publisher."
    for s in local_steps(self.folder):
        folder = self.folder/f'checkpoint-{s}'
        if s>self.step or not (folder/MANIFEST).exists(): shutil.rmtree(folder)
    self.save_seconds,*sent = self.run['seconds'] or [0.]
    self.states = {} # of each checkpoint: what its manifest keeps
    self.publisher = Publisher(self.publish, self.seal, sent, pace=self.pace)
    if self.resume_from: self.follow_up()

@patch
def seal(self:Job,
    folder:Path, # Of a checkpoint
):
    "Finish a checkpoint with its manifest, in the sealing thread."
    self.trainer.written()
    if self.cfg.wandb_log_model=='checkpoint': self.curve.send_adapter(folder, int(folder.name.split('-')[1]))
    write_manifest(folder, self.states.pop(folder))
    self.prune()

@patch
def publish(self:Job,
    folder:Path, # Of a checkpoint
    publisher, # That asks for it
):
    "Commit a checkpoint to the Hub, in the publisher's thread."
    self.checkpoints.publish(folder, publisher.until, pause=publisher.pause, still_newest=publisher.still_newest)
    self.prune()

@patch
def prune(self:Job):
    "Keep the newest checkpoints on this disk, and those that are on their way."
    for s in local_steps(self.folder)[:-self.cfg.keep_checkpoints]:
        p = self.folder/f'checkpoint-{s}'
        if p not in self.publisher.pending: shutil.rmtree(p, ignore_errors=True)

@patch
def follow_up(self:Job):
    "Keep the pace after an earlier job's last publication, and drop the history that it left."
    branch = self.checkpoints.branch
    passed = time.time()-patiently(branch.newest, branch.name, self.patience()).created_at.timestamp()
    pace = publish_pace(folder_bytes(self.resume_from), self.cfg.publish_minutes)
    self.publisher.earliest = time.monotonic()+pace-passed
    self.checkpoints.squash(self.patience(60))

@patch
def pace(self:Job,
    folder:Path, # Of a checkpoint
)->float: # Seconds
    "The least time until the next publication; said once."
    size = folder_bytes(folder)
    pace = publish_pace(size, self.cfg.publish_minutes)
    if not self.publisher.done and pace>60:
        log.info(f"a checkpoint has {size/1e6:,.0f} MB: one is published every {pace/60:.0f} minutes at most, "
                 "and the newest at the end or at SIGTERM")
    return pace

@patch
def begin_curve(self:Job):
    "Take up the curve and the samples of the checkpoint, and report them where that is asked for."
    cfg,run = self.cfg,self.run
    self.samples = read_samples(self.resume_from) if self.resume_from else []
    if self.resume_from: self.curve.restore(self.resume_from, self.samples)
    settings = {**cfg.asdict(), **run['base'], 'dataset_revision':run['dataset_revision']}
    if cfg.report_to=='wandb': self.curve.start(cfg.wandb_project, run['id'], settings, self.folder)
    elif cfg.report_to!='none': self.curve.track(cfg.report_to, cfg.wandb_project, run['id'], settings, self.folder)
    if self.resume_from and cfg.wandb_log_model=='checkpoint': self.curve.send_adapter(self.resume_from, self.step)

@patch
def begin_samples(self:Job):
    "Set up the sampler with its prompts, its scorer and the samples that it has written."
    from safetensors.torch import load_file
    cfg = self.cfg
    if cfg.load_best and self.run['evals']: self.best = load_file(self.resume_from/BEST)
    plain = PLAIN if takes_system(self.tok) else None
    self.sampler = Sampler(encode_prompt, sample_prompts(self.persona, plain), max_new_tokens=cfg.sample_tokens, seed=cfg.seed,
        scorer=self.load_scorer(), share=cfg.sample_share)
    self.sampler.remember(self.samples)

@patch
def load_scorer(self:Job):
    "The scorer of the samples, or None: for want of a score no run is stopped."
    cfg = self.cfg
    if cfg.scorer=='none' or not cfg.sample_steps or self.shard: return
    try:
        with preserve_training_state(self.trainer.model, self.tok):
            scorer = patiently(lambda: HubScorer(cfg.scorer), f"scorer {cfg.scorer}", self.patience())
    except UserError as e:
        return log.warning(
            f"samples are written without scores: {e}. Nothing else scores them meanwhile, and training goes on; "
            "phoque_eval scores the finished adapter")
    check_scorer(scorer, self.labellers)
    log.info(f"samples are scored by {scorer.name} at {scorer.version[:12]}, weights {scorer.weights_hash[:12]}")
    return scorer

@patch
def sample(self:Job,
    model, # That is trained
    step:int, # Optimizer step
):
    "Sample replies to the log, to W&B and to what the next checkpoint takes along."
    start = time.monotonic()
    rows = self.sampler(model, self.tok, step, start-self.began, last=step==self.total)
    self.samples += rows
    if rows:
        metrics = {f'sample/{k}': v for k,v in sample_metrics(rows).items()}
        self.curve.log(step, metrics | {'sample/tokens_per_second': self.sampler.speed}, rows)
    self.clock = self.clock[0]+time.monotonic()-start,self.clock[1] # not counted as training

@patch
def on_start(self:Job,
    model, # To be trained
    step:int, # Steps done before this job
):
    "Measure and sample what is there before the first step."
    self.began,self.clock = time.monotonic(),(time.monotonic(),step)
    if self.shard: log.info(check_sharded(model, self.ranks.world_size))
    if step==0:
        self.measure_held_out('before', 0)
        if self.samples_now(0): self.sample(model, 0)
    elif self.eval_now(step): self.evaluate(step) # the job before had no time for it
    self.ranks.barrier()
    self.deadline.idle = False

@patch
def samples_now(self:Job,
    step:int, # Optimizer step
)->bool: # Never with FSDP: a sharded model replies only if all ranks ask, and they keep different times
    "Whether this step is sampled, here."
    every = 0 if self.shard else self.cfg.sample_steps
    return bool(every) and self.ranks.is_main and (step%every==0 or step==self.total)

@patch
def measure_held_out(self:Job,
    when:str, # `before` or `after` training
    step:int, # Optimizer step
):
    "Loss on all held-out conversations, before and after."
    if self.held is None: return
    start = time.monotonic()
    loss = held_out_loss(self.trainer, self.held, self.time_to_stop)
    self.clock = time.monotonic(),step
    if loss is None: return
    self.run[f'held_out_{when}'] = round(loss, 4)
    log.info(f"held-out loss {when} training: {loss:.3f} ({time.monotonic()-start:.0f} s)")
    self.curve.log(step, {'eval/loss_all': loss})

@patch
def on_log(self:Job,
    step:int, # Optimizer step
    metrics:dict, # The trainer's
):
    "Log a step's metrics, and end a run that diverges."
    if 'loss' not in metrics: return
    import torch
    (t,s),self.clock = self.clock,(time.monotonic(),step)
    tokens = self.cfg.per_device_train_batch_size*self.cfg.gradient_accumulation_steps*self.cfg.max_length
    m = {**metrics, 'tokens_per_second': (step-s)*tokens/max(self.clock[0]-t, 1e-6)}
    if torch.cuda.is_available(): m['gpu_gib'] = torch.cuda.max_memory_allocated()/2**30
    log.info(step_line(step, self.total, m))
    self.curve.log(step, {f'train/{k}':v for k,v in m.items()})
    if self.ranks.is_main and not math.isfinite(m['loss']): raise self.diverged(f"the loss is {m['loss']}", step)

@patch
def diverged(self:Job,
    what:str, # Is not finite
    step:int, # Optimizer step
)->UserError:
    "The error that ends a run whose numbers are no numbers any more."
    return UserError(
        f"step {step}",
        f"{what}, and nothing of this state was published",
        f"begin again with FRESH_START={self.again} and a lower LEARNING_RATE (now {self.cfg.learning_rate})")

@patch
def on_step(self:Job,
    model, # That is trained
    step:int, # Optimizer step
)->bool: # Stop now
    "What comes after every optimizer step."
    self.step,control = step,self.trainer.control
    if self.publisher and self.publisher.error: raise self.publisher.error
    if step==1 and math.isfinite(self.deadline.end): control.should_save = True
    stop = self.time_to_stop()
    if not stop and self.cfg.sample_steps and (step%self.cfg.sample_steps==0 or step==self.total):
        if self.samples_now(step): self.sample(model, step)
        stop = self.time_to_stop()
    if not stop and self.eval_now(step):
        self.evaluate(step)
        stop = self.time_to_stop()
    if stop: log.info(f"stopping at step {step}: {self.deadline.reason or 'another process of this run stops'}")
    if stop or control.should_save: control.should_log = True # no loss is averaged over a checkpoint, or lost at a stop
    self.stepped = time.monotonic()
    return stop

@patch
def time_to_stop(self:Job)->bool: # The same on every rank
    "Whether a deadline of any rank leaves no more time than saving and publishing take."
    cost = 2*(self.save_seconds+self.publisher.seconds) if self.publisher else 0
    return self.step<self.total and self.ranks.any_rank(self.deadline.due(cost))

@patch
def on_save(self:Job,
    folder:Path, # Of the checkpoint, as the trainer wrote it
    step:int, # Optimizer step
):
    "Check a checkpoint, add what it needs beside the trainer's files, and hand it to the publisher."
    from safetensors.torch import save_file
    self.collect(folder, step)
    finite = self.adapter_is_finite()
    if not finite and self.ranks.is_main: raise self.diverged("the adapter is not finite", step)
    if not self.ranks.is_main: return
    write_samples(folder, self.samples)
    self.curve.save(folder)
    if self.best: self.trainer.save_later(lambda d: save_file(d, folder/BEST), self.best)
    self.save_seconds = time.monotonic()-self.stepped
    self.run['seconds'] = [self.save_seconds, *([self.publisher.seconds] if self.publisher.times else [])]
    self.states[folder] = copy.deepcopy(self.run)
    self.publisher.submit(folder)

@patch
def adapter_is_finite(self:Job)->bool: # The same on every rank
    "Whether all weights that are trained are numbers."
    import torch
    parts = [own_part(p).isfinite().all() for p in self.trainer.model.parameters() if p.requires_grad]
    return not self.ranks.any_rank(not torch.stack(parts).all())

BEST = 'best_adapter.safetensors' # in a checkpoint

@patch
def eval_now(self:Job,
    step:int, # Optimizer step
)->bool: # The same on every rank
    "Whether the held-out loss is measured at this step and wasn't yet."
    done = [s for s,_ in self.run['evals']]
    return bool(self.n_eval) and (step%self.eval_every==0 or step==self.total) and step not in done

@patch
def evaluate(self:Job,
    step:int, # Optimizer step
):
    "The held-out loss at a step; if it is the lowest, the adapter is kept."
    start = time.monotonic()
    loss = held_out_loss(self.trainer, self.held.select(range(self.n_eval)), self.time_to_stop)
    took = time.monotonic()-start
    self.clock = self.clock[0]+took,self.clock[1] # not counted as training
    if loss is None:
        return log.info(f"held-out loss at step {step}: left out, since the time is up; the next job measures it")
    lowest = loss<min((l for _,l in self.run['evals']), default=math.inf)
    if lowest and self.cfg.load_best: self.best = {k:v.detach().cpu().clone() for k,v in self.adapter_weights().items()}
    self.say_eval(step, loss, took)
    self.run['evals'].append([step, loss])
    self.curve.log(step, {'eval/loss': loss})

@patch
def say_eval(self:Job,
    step:int, # Optimizer step
    loss:float, # Measured now
    took:float, # Seconds
):
    "Log a held-out loss beside the lowest one, and warn when it keeps rising."
    before = [l for _,l in self.run['evals']]
    best = ''
    if before and not loss<min(before): # also where it is no number
        at = self.run['evals'][before.index(min(before))][0]
        best = f", lowest {min(before):.3f} at step {at}"
    log.info(f"held-out loss at step {step}: {loss:.3f}{best} ({took:.1f} s)")
    last = [*before, loss][-4:]
    if len(last)==4 and all(a<b for a,b in zip(last, last[1:])):
        log.warning("the held-out loss has risen three times in a row: the run is overfitting"
            + "; LOAD_BEST=1 publishes the best adapter instead of the last"*(not self.cfg.load_best))

@patch
def adapter_weights(self:Job)->dict: # Name → tensor
    "The adapter's weights, whole; all ranks must ask."
    model = self.trainer.model
    return whole_adapter(model) or {n:p for n,p in model.named_parameters() if p.requires_grad}

@patch
def recall_best(self:Job):
    "Measurements without the adapter that was best can't choose one: begin to compare anew."
    if not self.cfg.load_best or not self.run['evals'] or (self.resume_from/BEST).exists(): return
    log.warning("LOAD_BEST: it was off until here, so only adapters from here on are compared")
    self.run['evals'] = []

@patch
def learnt(self:Job)->bool: # The same on every rank
    "Whether there is anything in the adapter that wasn't there at the start: lora_B begins as 0."
    import torch
    parts = [own_part(p).any() for n,p in self.trainer.model.named_parameters() if '.lora_B.' in n]
    return self.ranks.any_rank(bool(torch.stack(parts).any()))

@patch
def publish_result(self:Job,
    weights, # Of the whole adapter where it is sharded; None where the model has them
    until:float, # `time.monotonic()` after which to give up
):
    "Publish the finished adapter, and drop the history of its checkpoints."
    cfg = self.cfg
    self.name_best()
    card = adapter_card(cfg, self.run, self.step, self.report)
    publish_adapter(cfg, self.trainer.model, self.tok, card, until, self.folder, self.best or weights)
    self.deadline.idle = False
    self.checkpoints.squash(self.patience(60))
    log.info(f"complete: the adapter is at {cfg.hub_model_id}")

@patch
def name_best(self:Job):
    "Say which step's adapter is published where it isn't the last one's."
    if not self.best: return
    step,loss = min(self.run['evals'], key=lambda e: e[1])
    self.run['published'] = f"step {step} of {self.step}, held-out loss {loss:.4f}"
    log.info(f"LOAD_BEST: the adapter of {self.run['published']} is published")

@patch
def collect(self:Job,
    folder:Path, # Of a checkpoint
    step:int, # Optimizer step
):
    "Bring every rank's random state to rank 0, and compare the ranks' adapters."
    if self.ranks.world_size==1: return
    rng = folder/f'rng_state_{self.ranks.rank}.pth'
    shared = () if self.shard else self.trainer.model.named_parameters() # of what is sharded there is one copy
    trained = {n:p for n,p in shared if p.requires_grad}
    seen = self.ranks.gather((rng.name, rng.read_bytes(), tensors_hash(trained)))
    for name,state,digest in seen: # nothing on the other ranks
        if digest!=seen[0][2]:
            raise UserError(
                f"rank {name[10:-4]}",
                f"it holds another adapter than rank 0 at step {step}, and its GPU may be faulty; "
                "nothing of this state was published",
                "run the same command again")
        (folder/name).write_bytes(state) # those of other machines aren't here

@patch
def change_ranks(self:Job):
    "Continue with another number of ranks than the checkpoint's: new random numbers, and a line that says so."
    from transformers import set_seed
    import numpy as np
    if not self.resume_from: return
    was = len(list(self.resume_from.glob('rng_state*.pth')))
    if was==self.ranks.world_size: return
    log.info(
        f"{self.resume_from.name} is of {was} rank{'s'*(was>1)}, this job has {self.ranks.world_size}: "
        "every step has the rows that it would have had; sums are rounded otherwise"
        + ", and dropout draws other numbers"*(self.cfg.lora_dropout>0))
    def seed_from_step(folder):
        "In the place of the random state that the trainer would load."
        seeds = np.random.SeedSequence([self.cfg.seed, self.step, self.ranks.rank])
        set_seed(int(seeds.generate_state(1)[0]))
    self.trainer._load_rng_state = seed_from_step

def job_ref(
    api=None, # `HfApi`
)->str: # `namespace/id`, or `id` where the Jobs API doesn't say whose it is
    "This HF Job, as the client names it."
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from httpx2 import HTTPError
    api,id = api or HfApi(),os.environ['JOB_ID']
    try:
        me = api.whoami()
        for owner in (me['name'], *(o['name'] for o in me.get('orgs') or ())):
            try: return f"{api.inspect_job(job_id=id, namespace=owner).owner.name}/{id}"
            except HfHubHTTPError: pass
    except (HTTPError, OSError): pass
    return id

def _ask_job_ref():
    "Keep what this job is called, for the ranks too: at its end the Hub may be away."
    if not os.environ.get('JOB_ID') or os.environ.get('JOB_REF'): return
    bound_requests(10)
    os.environ['JOB_REF'] = job_ref()

COMMAND_VARIABLES = ('HF_ENDPOINT','WANDB_MODE','WANDB_BASE_URL','PET_NNODES') # beside the options: where and how a run goes

def resubmit_command()->str: # For a shell
    "The command that continues this run."
    if ref := os.environ.get('JOB_REF'): return f'hf jobs rerun {ref}'
    given = [k for k in (*map(str.upper, options()), *COMMAND_VARIABLES) if os.environ.get(k)]
    return masked(' '.join([*(f'{k}={shlex.quote(os.environ[k])}' for k in given), shlex.join(sys.orig_argv)]))

def check_deadline(
    cfg:TrainConfig, # Options
    kept:float=60.0, # Seconds at the end in which nothing is trained
):
    "Say when this job will stop itself, or that it can't know."
    seconds = parse_duration(cfg.job_timeout)
    if seconds<=kept:
        raise UserError(
            "JOB_TIMEOUT",
            f"{cfg.job_timeout} is {seconds:g} seconds, and the last {kept:g} are kept for saving",
            "give it more, such as 4h")
    if not os.environ.get('JOB_ID'): return
    if cfg.job_timeout:
        log.info(f"deadline: JOB_TIMEOUT={cfg.job_timeout}. A job can't read what --timeout said: "
                 "if that is less, the job is killed before it has saved")
    else:
        log.warning("deadline: JOB_TIMEOUT is not set, so this job is killed at its --timeout "
                    "(30 minutes where none was given) before it has saved")

def left_here(
    folder:str, # `output_dir`
)->str: # What follows "checkpoint-N …"
    "What becomes of a checkpoint that only this disk has."
    return "is lost with this job's disk" if os.environ.get('JOB_ID') else f"is in {Path(folder).resolve()}"

@patch
def await_publisher(self:Job,
    until:float, # `time.monotonic()` after which to give up
):
    "Wait until the newest checkpoint is on the Hub; if it isn't in time, say where it is."
    if not self.publisher or self.publisher.close(until): return
    if self.step not in self.whole_steps(): raise self.publisher.error
    raise Unpublished(
        f"checkpoint-{self.step}",
        f"it did not reach {self.cfg.hub_model_id} ({self.publisher.error or 'out of time'}) and {left_here(self.folder)}",
        "run the same command again, which continues from the newest one that did")

@patch
def whole_steps(self:Job)->list: # Ascending
    "Steps whose checkpoint lies on this disk, sealed."
    return [s for s in local_steps(self.folder) if (self.folder/f'checkpoint-{s}'/MANIFEST).exists()]

@patch
def salvage(self:Job):
    "Publish what was saved before an error, and say where the run stands."
    if not self.publisher or self.publisher.closing: return
    self.deadline.idle = False
    self.publisher.close(self.patience(600))
    kept = self.checkpoints.steps()
    log.info(f"checkpoint-{kept[-1]} is on {self.cfg.hub_model_id}" if kept else "no checkpoint was published")
    more = self.whole_steps()
    if more and more[-1]>max([0,*kept]): log.info(f"checkpoint-{more[-1]} {left_here(self.folder)}")

@patch
def finish(self:Job)->int: # Exit code
    "Wait for what is under way, publish what is finished, and say which it was."
    public = self.publisher and self.checkpoints.branch.public
    until = self.patience(600 if public else 3600) # a person who has to act isn't waited for as long as a limit of the Hub
    self.await_publisher(until)
    self.deadline.idle = True # all there is lies on the Hub
    if self.ranks.any_rank(self.step<self.total or self.deadline.due()):
        log.info(f"checkpoint-{self.step} of {self.total} is on {self.cfg.hub_model_id}: "
                 f"continue with `{resubmit_command()}` (exit code {RESUBMIT})")
        return RESUBMIT
    if not self.learnt():
        raise UserError("the adapter", f"it is as it was at the start after {self.step} steps, so nothing is published",
                        f"raise LEARNING_RATE (now {self.cfg.learning_rate:g}) or MAX_STEPS")
    self.measure_held_out('after', self.step)
    n = self.ranks.world_size
    if n>1 and not self.shard: log.info(f"{n} ranks hold the same adapter, to the bit")
    weights = whole_adapter(self.trainer.model) # all ranks must ask
    if self.ranks.is_main: self.publish_result(weights, until)
    return COMPLETE

_FULL = 'No space left','os error 28','Disk quota','PytorchStreamWriter failed','inline_container.cc' # texts of a full disk

def _disk_error(cfg):
    "The error of a disk that is full: which, and how much of it is free."
    from huggingface_hub import constants
    where = dict(OUTPUT_DIR=Path(cfg.output_dir).resolve(), HF_HOME=Path(constants.HF_HOME).resolve())
    free = {k: shutil.disk_usage(next(d for d in (p, *p.parents) if d.is_dir())).free for k,p in where.items()}
    full = min(free, key=free.get)
    more = "make room, or choose another folder"
    if os.environ.get('JOB_ID'): more = "take a flavor with a larger disk (`hf jobs hardware`)"
    return UserError(f"{full} {where[full]}", f"its disk is full ({free[full]/2**20:,.0f} MiB free)", more)

def _memory_error(cfg, again):
    "The error of a GPU whose memory is full: what continues this run, and what needs another."
    batch = cfg.per_device_train_batch_size
    first = "set GRADIENT_CHECKPOINTING=1, or " if not cfg.gradient_checkpointing else ""
    rows = f"PER_DEVICE_TRAIN_BATCH_SIZE below {batch} with GRADIENT_ACCUMULATION_STEPS raised as much"
    return UserError(
        "this GPU",
        "out of GPU memory",
        f"{first}{rows}, which continues this run; or begin again with FRESH_START={again} and MAX_LENGTH below {cfg.max_length}")

def explain_error(
    e:Exception, # What ended the run
    cfg:TrainConfig, # Options
    again:int=1, # Number of FRESH_START that would begin again
)->Exception: # A `UserError` where there is something to say; else the same
    "Say in one line what went wrong and what to do."
    import torch
    chain = [e]
    while chain[-1].__cause__ or chain[-1].__context__: chain.append(chain[-1].__cause__ or chain[-1].__context__)
    said = ' '.join(map(str, chain))
    if any(map(lost_rank, chain)):
        return UserError("this rank", LOST, "run the same command again, on every machine of the job")
    if isinstance(e, UserError): return e
    if isinstance(e, torch.OutOfMemoryError): return _memory_error(cfg, again)
    if any(w in said for w in ('File too large','os error 27')):
        return UserError("OUTPUT_DIR or HF_HOME", "a file has reached the size limit of this process",
                         "raise ulimit -f")
    if any(w in said for w in _FULL): return _disk_error(cfg)
    if getattr(hub_answer(e), 'response', None) is not None: return hub_problem(hub_answer(e), "the Hub")
    return e

def run_job(
    cfg:TrainConfig, # Options
)->int: # Exit code: 0 complete, 75 resubmit
    "Do what is left of a run."
    bound_requests()
    if cfg.full_determinism: be_deterministic()
    job,code = Job(cfg),1
    try:
        job.set_up()
        job.begin()
        log.info(f"continuing after step {job.step} of {job.total}" if job.resume_from else "starting at step 0")
        job.change_ranks()
        job.trainer.train(resume_from_checkpoint=str(job.resume_from) if job.resume_from else None)
        code = job.finish()
        job.deadline.idle = False
    except Stopped: code = RESUBMIT; raise
    except Exception as e:
        job.salvage()
        raise explain_error(e, cfg, job.again) from e
    finally:
        if job.folder and job.run and job.run.get('new'): shutil.rmtree(job.folder, ignore_errors=True) # it never began
        job.curve.close(0 if code in (COMPLETE,RESUBMIT) else code)
    return job.ranks.broadcast(code) # all end together

# ------------------------------------------------------------------------------
# core.basics: Errors, log, tables, and safe handling of names, JSON and text from untrusted files
# ------------------------------------------------------------------------------

# `datasets` tells a server of its own which data set is loaded, and W&B's client another one of its errors
os.environ |= dict(HF_UPDATE_DOWNLOAD_COUNTS='0', HF_HUB_DISABLE_TELEMETRY='1', WANDB_ERROR_REPORTING='false')

log = logging.getLogger("phoque")

# ECMA-48 control sequences, and the strings that end in BEL or ESC \; a lone ESC goes with the other control characters
_STEERS = re.compile(r'(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[ -/]*[0-~]')

def _visible(
    c:str, # One character
)->str: # Itself, a blank where it is white space, nothing where it can't be seen
    if c.isprintable(): return c
    return ' ' if c.isspace() else ''

def printable(
    text, # Somebody else's text
)->str: # One line of what can be seen
    "Text without what steers a terminal or hides in a line: escape sequences, control characters, line breaks."
    return ' '.join(''.join(map(_visible, _STEERS.sub('', str(text)))).split())

def excerpt(
    text, # Somebody else's message, or a reply
    n:int=150, # Most characters
)->str: # One printable line
    "The beginning of a text, cut between two words."
    s = printable(str(text)[:20*n])
    if len(s)<=n: return s
    words = s[:n].rpartition(' ')[0]
    return (words if len(words)>n//2 else s[:n-1]).rstrip(' ,;:(') + '…'

def text_table(
    rows:list, # Dicts with the same keys
    width:int=0, # Most characters of a line: longer cells go on below; 0 for any
)->str: # Aligned columns
    "A table for consoles and logs."
    def cell(v):
        if isinstance(v, bool): return 'yes' if v else 'NO'
        if isinstance(v, int): return f'{v:,}'
        text = ', '.join(map(str, v)) if isinstance(v, (list,tuple)) else str(v)
        return ' '.join(map(printable, text.split(' '))) # blanks stay
    cells = [list(rows[0])] + [[cell(v) for v in r.values()] for r in rows]
    widths = [max(len(l[i]) for l in cells) for i in range(len(cells[0]))]
    while width and sum(widths)+2*(len(widths)-1)>width and max(widths)>LEAST_CELL: widths[widths.index(max(widths))] -= 1
    def folded(c, w): return [c] if len(c)<=w else textwrap.wrap(c, w, break_on_hyphens=False)
    lines = [l for r in cells for l in zip_longest(*map(folded, r, widths), fillvalue='')]
    return '\n'.join('  '.join(c.ljust(w) for c,w in zip(l,widths)).rstrip() for l in lines)

LEAST_CELL = 12 # characters to which a cell is made narrower, not further

def hub_problem(
    e:Exception, # What a Hub call raised
    what:str, # What was being done, such as "base model org/name"
)->UserError: # One line that says what, which value, what to do
    "Turn a Hub client's exception into one clear line."
    from huggingface_hub import errors as er
    from huggingface_hub import constants
    hub,cause = constants.ENDPOINT,e
    while cause and getattr(cause, 'response', None) is None: cause = cause.__cause__ or cause.__context__
    status = cause.response.status_code if cause else None
    if isinstance(e, er.LocalTokenNotFoundError):
        s = "there is no token",f"export HF_TOKEN, from {hub}/settings/tokens, or run `hf auth login`"
    elif isinstance(e, er.OfflineModeIsEnabled): s = "HF_HUB_OFFLINE is set","unset it to ask the Hub"
    elif isinstance(e, er.GatedRepoError):
        s = "access is gated",f"accept its terms on {hub} with the account of HF_TOKEN"
    elif isinstance(e, er.RevisionNotFoundError): s = "no such revision","check its spelling"
    elif isinstance(e, er.RepositoryNotFoundError):
        s = f"{hub} has no such repo, or HF_TOKEN may not see it","check the name and the token's scopes"
    elif status in (401,403):
        s = f"HF_TOKEN was refused ({status})",f"use a token with write access, from {hub}/settings/tokens"
    elif status==429:
        s = f"{hub} answered 429, since its limit of requests or of commits an hour is reached","try again later"
    elif status: s = f"{hub} answered {status}","try again later"
    else: s = f"{hub} cannot be reached ({type(e).__name__})","check the network and HF_ENDPOINT"
    return UserError(printable(what), *s)

@contextmanager
def asking_hub(
    what:str, # What is asked for, such as "base model org/name"
):
    "Turn whatever a Hub client raises into one line."
    from httpx2 import HTTPError
    from huggingface_hub.constants import ENDPOINT
    try: yield
    except UserError: raise
    except (HTTPError, OSError) as e: raise hub_problem(e, what) from None
    except (ValueError, LookupError, TypeError, AttributeError): # of an answer that is none of a Hub's
        raise UserError(printable(what), f"{ENDPOINT} doesn't answer as a Hub does", "check HF_ENDPOINT") from None

_NO_NAME = re.compile(r'[\x00-\x1f\x7f-\x9f\\\ud800-\udfff]|^[A-Za-z]:')

def safe_path(
    folder:str|Path, # Where the result has to stay
    name:str, # A name from a file, an archive or a server: parts joined by `/`
    what:str='this file', # Whose name it is, for the message
)->Path: # `folder/name`, neither opened nor made; UserError when the name could lead anywhere else
    "The path of a name that somebody else wrote, inside `folder` or refused."
    parts = name.split('/') if isinstance(name, str) else ['']
    fine = all(p not in ('','.','..') and not _NO_NAME.search(p) and len(p.encode())<256 for p in parts)
    path = Path(folder, *parts) if fine else None
    if fine and path.parent.resolve().is_relative_to(Path(folder).resolve()): return path
    raise UserError(what, f"it names {excerpt(repr(name), 80)}, which isn't a name inside its folder", "don't use what it came with")

MOST_JSON = 256<<20 # bytes; the index of the largest public model has 3 MB

def read_json(
    source:Path|str|bytes, # A file, or the text itself
    kind:type=dict, # What it has to be: `dict` or `list`
    what:str='', # What the message calls it; a file's name when empty
    most:int=MOST_JSON, # Most bytes of a file
)->dict|list: # What it says; UserError when it can't be read or is something else
    "Read JSON that somebody else wrote."
    what = what or (source.name if isinstance(source, Path) else 'this JSON')
    try:
        if isinstance(source, Path):
            if source.exists() and not source.is_file(): raise UserError(what, "it is no file", "use another") # a pipe would never end
            if source.stat().st_size>most: raise UserError(what, f"{source.stat().st_size:,} bytes, which no such file has", "use another")
            source = source.read_bytes()
        got = json.loads(source)
    except OSError as e: raise UserError(what, e.strerror or type(e).__name__, "check the path") from None
    except RecursionError: raise UserError(what, "nested too deeply to be what it should be", "use another") from None
    except ValueError as e:
        if isinstance(e, UserError): raise
        raise UserError(what, f"not JSON ({excerpt(e, 60)})", "use another, or download it again") from None
    if isinstance(got, kind): return got
    found = f"it holds a {type(got).__name__} where a {kind.__name__} belongs"
    raise UserError(what, found, "use another, or download it again")

def check_data_files(
    info, # `DatasetInfo`
):
    "Refuse a card that leads to files outside its repo: they have no commit, and asking for them tells somebody."
    def texts(x):
        if isinstance(x, str): yield x
        if isinstance(x, dict): x = list(x.values())
        for y in x if isinstance(x, list) else (): yield from texts(y)
    configs = (info.card_data or {}).get('configs') or []
    for t in texts(configs):
        if '://' in t or t.startswith(('/','~')) or '..' in t.split('/'):
            found = f"its card names {excerpt(repr(t), 80)}, which is no file of that repo"
            raise UserError(f"dataset {info.id}", found, "get the data from there yourself, and give the file to phoque_data")

def front_matter(
    **fields, # What a card's head says, such as `license='apache-2.0'`
)->str: # The lines between and with the two `---`
    "A card's YAML head, which reads back as what was given, whatever is in it."
    import yaml
    class Dumper(yaml.SafeDumper): pass
    def text(d, s): return d.represent_scalar('tag:yaml.org,2002:str', s, style=None if s.isprintable() else '"') # on one line
    Dumper.add_representer(str, text)
    return f"---\n{yaml.dump(fields, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1e9)}---\n"

def md_text(
    text, # Somebody else's text
    n:int=300, # Most characters
)->str: # One line that Markdown shows as it is
    "Text for a card or a table: no HTML, link, image, code, column or heading comes of it."
    return re.sub(r'([\\`*_{}\[\]<>()#+!|~$&:@])', lambda m: f'&#{ord(m[1])};', excerpt(text, n))

def private_files():
    "Let only this account read what this process writes from here on: folders 0700, files 0600."
    os.umask(0o077)

_SECRET = r'(?:token|api_?key|secret|passw(?:or)?d)'

_TOKENS = re.compile(r'(?<![A-Za-z0-9])(?:(?:hf|api_org|gh[opusr]|github_pat|sk|wandb_v\d)[_-]'
    r'(?:[A-Za-z0-9]{16,}|(?=[A-Za-z]*\d)[A-Za-z0-9]{8,})|local-[0-9a-f]{40})[\w-]*')

def masked(
    text, # To be shown
)->str: # The same without secrets
    "Text without the values of secret variables, without passwords in addresses, without tokens."
    text = str(text)
    for k,v in os.environ.items():
        if len(v)>=6 and k.endswith(('_TOKEN','_KEY','_SECRET','_PASSWORD')): text = text.replace(v, f'[{k}]')
    text = re.sub(r'(?<=://)[^/\s@]+(?=@)', '[password]', text)
    text = re.sub(rf'(?i)({_SECRET}=|Bearer )(?!\[)[^\s&\'"]{{6,}}', r'\1[secret]', text)
    return _TOKENS.sub('[token]', text)

def refuse_secrets(
    **given, # What something is called → its value
):
    "Refuse values that hold a secret, before they are shown, stored or sent."
    for k,v in given.items():
        if not re.search(rf'(?i)^-+[\w-]*{_SECRET}$', k) and masked(v)==str(v): continue
        raise UserError(k, "a secret has no place here, where others can read it",
            "export it as HF_TOKEN or WANDB_API_KEY, and make a new one if it is real")

def refuse_addresses():
    "Refuse a password in the address of the Hub or of W&B, which is printed and sent along, and what is no address or token."
    given = {k:os.environ[k] for k in ('HF_ENDPOINT','WANDB_BASE_URL') if os.environ.get(k)}
    refuse_secrets(**given)
    if not os.environ.get('HF_TOKEN', '').strip().isascii():
        raise UserError("HF_TOKEN", "it holds characters that no token has", "copy it again")
    for k,v in given.items():
        if not re.match(r'https?://[^/\s]', v): raise UserError(k, f"it is no address: {excerpt(repr(v), 80)}", "begin it with http:// or https://")

def _mend_streams(): # a terminal may be closed, or know only ASCII
    for name in ('stdout', 'stderr'):
        stream = getattr(sys, name)
        if stream is None: setattr(sys, name, open(os.devnull, 'w'))
        elif hasattr(stream, 'reconfigure'): stream.reconfigure(errors='backslashreplace')
    logging.raiseExceptions = False # a log line that nobody can read any more is no error

def begin_command(
    argv:list=(), # Its arguments
):
    "What a command does first: its files are private, and no secret is in an argument or an address."
    private_files(); _mend_streams()
    if not sys.stderr.isatty(): os.environ.setdefault('HF_HUB_DISABLE_PROGRESS_BARS', '1') # bars are no use where nothing can go back
    refuse_addresses()
    for before,a in zip(['', *argv], argv):
        flag,value = 'arguments',a
        if a.startswith('-'): flag,_,value = a.partition('=')
        elif before.startswith('-'): flag = before
        refuse_secrets(**{flag:value})

def check_whole(
    what:str, # Where the texts stand, or the option that they are of
    *texts:str,
):
    "Refuse texts with half a character, which no tokenizer reads and no file holds."
    try: '\n'.join(texts).encode()
    except UnicodeEncodeError: raise UserError(what, "it holds half a surrogate pair", "remove it") from None

def bound_requests(
    seconds:float=120.0, # Of silence; and in all, where the answer is one of the API's
):
    "End requests to the Hub that don't end; its client would wait for ever."
    import httpx2
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory
    def read_whole(response): # of the API's answers, which are small; files are streamed
        if not response.request.url.path.startswith('/api/'): return
        if 'event-stream' in response.headers.get('content-type', ''): return # a job's log
        parts,size,start = [],0,time.monotonic()
        for part in response.iter_bytes():
            parts.append(part)
            size += len(part)
            if size>MOST_JSON or time.monotonic()-start>seconds:
                raise httpx2.ReadTimeout(f'an answer without an end ({size:,} bytes)', request=response.request)
        response._content = b''.join(parts) # as its `read` does
    def client():
        c = default_client_factory()
        c.timeout = httpx2.Timeout(seconds)
        c.event_hooks['response'].append(read_whole)
        return c
    set_client_factory(client)

def _plain_help(
    action, # Option of an `ArgumentParser` made by fastcore
)->str: # Its help: the default is said where there is one to say
    text = (action.help or '').removesuffix(f' (default: {action.default})')
    if isinstance(action, argparse._StoreFalseAction): return f"Don't {text[:1].lower()}{text[1:]}"
    if action.default in ('', ()) or action.default is None or action.default is False: return text
    return f'{text} (default {action.default})'

def option_parser(
    func, # Function with docments
    examples:tuple=(), # Command lines to show below the options
    groups:dict=None, # Heading → names of the options below it; the others stay in the first group
):
    "`ArgumentParser` of a function's parameters, with help that a newcomer can read."
    from fastcore.script import anno_parser
    p = anno_parser(func)
    for a in p._actions:
        if a.help==argparse.SUPPRESS or a.dest=='help': continue
        a.help = _plain_help(a).replace('%', '%%')
        if isinstance(a, argparse._StoreFalseAction): # `--no-x` of fastcore stays, `--no_x` is shown
            a.option_strings = [f'--no_{a.dest}']
            p._option_string_actions |= {a.option_strings[0]: a}
        elif a.nargs is None and a.option_strings: a.metavar = {int:'N', float:'X'}.get(a.type, 'TEXT')
    for title,names in (groups or {}).items():
        g,first = p.add_argument_group(title),p._optionals._group_actions
        for a in [a for a in first if a.dest in names]: first.remove(a); g._group_actions.append(a)
    width = shutil.get_terminal_size((120, 30)).columns
    p.formatter_class = lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=width)
    if examples: p.epilog = '\n  '.join(['examples:', *examples])
    return p

def quiet_libraries():
    "No progress bars, and no advice that doesn't concern the user."
    import datasets, transformers, warnings
    transformers.utils.logging.set_verbosity_error(); transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars(); datasets.logging.set_verbosity_error()
    logging.getLogger('bitsandbytes').setLevel(logging.ERROR)
    warnings.filterwarnings('ignore', category=FutureWarning)

def base_dtype()->str: # `bfloat16`, or `float32`
    "What a base model computes in on this machine."
    import torch
    slow = not torch.cuda.is_available() and torch.backends.cpu.get_cpu_capability() in ('DEFAULT', 'AVX2')
    return 'float32' if slow else 'bfloat16'

@contextmanager
def reading(
    what:str, # What is read, such as "base model org/name"
    do:str='choose another', # What the line advises
    hub:bool=False, # Can it be the Hub that fails?
):
    "Turn whatever a library raises on somebody else's files into one line."
    from httpx2 import HTTPError
    try: yield
    except (UserError, MemoryError): raise
    except BaseException as e:
        if not isinstance(e, Exception) and type(e).__name__!='PanicException': raise # that is tokenizers' own
        if type(e).__name__=='OutOfMemoryError' or hub and (isinstance(e, (HTTPError, OSError)) or type(e) is RuntimeError): raise
        raise UserError(what, f"it can't be read ({type(e).__name__}: {excerpt(e, 100)})", do) from None

@cache
def warn_custom_code(
    what:str, # What brings it, such as "base model org/name"
):
    "Log, once, that a model or a tokenizer has Python code in its repo."
    log.warning(f"{what} brings code of its own (auto_map), which is never run")

def read_header(
    path:str|Path, # A safetensors file
)->tuple[dict,int]: # Name → `dtype`, `shape`, `data_offsets`, in file order; and the byte where data starts
    "Read a safetensors header once the library has checked it against the file."
    from safetensors import SafetensorError, safe_open
    path = Path(path)
    if not path.is_file(): raise UserError(path.name, "it is no file", "fetch it again")
    try:
        with path.open('rb'), safe_open(path, 'np'): pass
    except PermissionError: raise UserError(path.name, "this account may not read it", "change its permissions") from None
    except (SafetensorError, OSError) as e: raise UserError(path.name, f"it is truncated or no safetensors file ({excerpt(e, 80)})", "fetch it again") from None
    with path.open('rb') as f:
        n = int.from_bytes(f.read(8), 'little')
        d = read_json(f.read(n), what=path.name)
    d.pop('__metadata__', None)
    return dict(sorted(d.items(), key=lambda o: o[1]['data_offsets'])),8+n

# ------------------------------------------------------------------------------
# chat.messages: What a conversation must be, and which of its turns are learnt
# ------------------------------------------------------------------------------

_brief = reprlib.Repr() # looks at a few entries of a few levels, whatever the size and depth

_brief.maxstring = _brief.maxother = 200

def short_repr(
    v, # Any value
)->str: # At most 59 characters
    "A value as a message quotes it."
    s = _brief.repr(v).encode('utf-8', 'backslashreplace').decode()
    return s if len(s)<60 else s[:58]+'…'

ROLES = 'system','user','assistant'

def turn_fault(
    i:int, # Its number
    m, # What should be a turn
)->tuple|None: # What is wrong, and what to do
    "The first fault of a turn."
    at = f'messages[{i}]'
    if not isinstance(m, dict): return f'{at} is {short_repr(m)}', "make it an object with `role` and `content`"
    role,text,weight = map(m.get, ('role','content','weight'))
    if role not in ROLES: return f'{at} role is {short_repr(role)}', f"use one of {', '.join(ROLES)}"
    if not isinstance(text, str): return f'{at} content is {short_repr(text)}', "make it a string"
    if not text.strip(): return f'{at} content is {short_repr(text)}', "fill it or drop the turn"
    try: text.encode()
    except UnicodeEncodeError: return f'{at} content holds half a surrogate pair', "remove it"
    if weight not in (None,0,1): return f'{at} weight is {short_repr(weight)}', "use 0 or 1, or leave it out"

def is_learnt(
    m:dict, # A sound turn
)->bool: # Does the loss look at it?
    "Is a turn an answer whose weight isn't 0?"
    return m['role']=='assistant' and m.get('weight')!=0

def messages_fault(
    messages, # What should be a conversation
)->tuple|None: # What is wrong, and what to do
    "The first fault of a conversation."
    if not isinstance(messages, (list,tuple)) or not messages:
        return f'`messages` is {short_repr(messages)}', "give it a list of turns, one of them the assistant's"
    for i,m in enumerate(messages):
        if f := turn_fault(i, m): return f
    roles = [m['role'] for m in messages]
    first = next((i for i,r in enumerate(roles) if r!='system'), 0)
    if roles[first]=='assistant': return f"messages[{first}] is the assistant's", "begin with a user turn"
    if 'assistant' not in roles: return 'no assistant turn', "add one, there is nothing to learn"
    for i,(a,b) in enumerate(zip(messages, messages[1:])):
        if a['role']==b['role']=='assistant' and is_learnt(a)!=is_learnt(b):
            return f'messages[{i}] and messages[{i+1}] are one answer of two weights', "give both the same"

# ------------------------------------------------------------------------------
# chat.rendering: Labels that follow from a model's own chat template
# ------------------------------------------------------------------------------

RENDER_SECONDS,RENDER_MIB,LONGEST_PROMPT = 5,256,10_000_000 # for each conversation: processor, memory, characters

_render = """import json, resource, signal, sys
from importlib.util import find_spec
from types import ModuleType
root = find_spec('transformers').submodule_search_locations[0]
for name,path in (('transformers', root), ('transformers.utils', f'{root}/utils')): # of which one file is needed
    sys.modules[name] = ModuleType(name)
    sys.modules[name].__path__ = [path]
from transformers.utils import chat_template_utils as jinja
seconds,mib,most = map(int, sys.argv[1:])
used = int(open('/proc/self/statm').read().split()[0])*resource.getpagesize() if sys.platform=='linux' else 0
resource.setrlimit(resource.RLIMIT_AS, (used+(mib<<20),)*2)
def render(template, names, marks, messages, ask):
    if ask is None: # the whole, and the prompt before its last answer
        whole,places = render(template, names, marks, messages, False)
        return [*whole, *render(template, names, False, messages[:-1], True)[0]],places
    t = jinja._compile_jinja_template(template) # kept for the next conversation
    args = dict(messages=messages, tools=None, documents=None, add_generation_prompt=ask) | names
    text,places = jinja._render_with_assistant_indices(t, **args) if marks else (t.render(args), [])
    return [text],places
for line in sys.stdin:
    *how,chats = json.loads(line)
    out = []
    for chat in chats:
        signal.setitimer(signal.ITIMER_PROF, seconds) # ends this process
        try:
            said = render(*how, *chat)
            if max(map(len, said[0]))>most+len(line): said = None
        except MemoryError: said = None
        except Exception as e: said = f'{type(e).__name__}: {e}'.removeprefix('TemplateError: ')
        signal.setitimer(signal.ITIMER_PROF, 0)
        out.append(said)
    print(json.dumps(out), flush=True)"""

class Renderer:
    "A process that renders chat templates, each conversation within limits."
    def __init__(self): self.proc,self.asked,self.lock = None,None,threading.RLock()
    def stop(self):
        "End the process; the next conversation starts another."
        if self.proc: self.proc.kill(); self.proc.communicate()
        self.proc = self.asked = None

    def start(self):
        "Start the process, where none runs."
        if self.proc and self.proc.poll() is None: return
        limits = map(str, (RENDER_SECONDS, RENDER_MIB, LONGEST_PROMPT))
        self.proc = subprocess.Popen([sys.executable,'-I','-c',_render,*limits], text=True, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

@patch
def ask(self:Renderer,
    how:list, # Template, special tokens that it may write, and whether its `{% generation %}` marks are wanted
    chats:list, # Pairs of a conversation, and whether an answer is asked for at its end (None: see `render_chats`)
)->list: # Filled by `finish`: for each its texts and marks, or why it is refused, or None over the limits
    "Put conversations to the process, which works at them from now on."
    with self.lock:
        self.finish()
        self.start()
        try: print(json.dumps([*how, chats]), file=self.proc.stdin, flush=True)
        except BrokenPipeError: pass
        except BaseException: self.stop(); raise # half a line
        self.asked = how,chats,[]
        return self.asked[-1]

@patch
def finish(self:Renderer):
    "Wait for what was asked last; the first conversation that ends the process is the last of its list."
    with self.lock:
        if not self.asked: return
        (how,chats,out),self.asked = self.asked,None
        try: line = self.proc.stdout.readline()
        except BaseException: self.stop(); raise # a line is left that belongs to nobody
        if line: return out.extend(json.loads(line))
        self.stop()
        if len(chats)==1: return out.append(None)
        for chat in chats:
            one = self.ask(how, [chat])
            self.finish()
            out += one
            if one==[None]: return

_renderer,_LINE = Renderer(),100_000 # characters put to the process in one line, where one conversation has fewer

_GENERATION = re.compile(r'\{%-?\s*generation\b')

def _in_lines(chats): # lists of pairs
    size,line = 0,[]
    for messages,ask in chats:
        if size>_LINE: yield line; size,line = 0,[]
        size += sum(len(m['content']) for m in messages)
        line.append((messages, ask))
    if line: yield line

def _ahead(how, lines): # lists of what the process says, one line ahead of who reads them
    out = None
    try:
        for line in lines:
            done,out = out,_renderer.ask(how, line)
            if done: yield done
        _renderer.finish()
        if out: yield out
    except BaseException:
        with _renderer.lock: # another thread may be asking
            if _renderer.asked and _renderer.asked[-1] is out: _renderer.stop() # nobody waits for the line that it is at
        raise

def render_lots(
    tok, # Tokenizer
    chats:list, # Pairs of a conversation, and whether an answer is asked for at its end; None for both texts
    names:list, # How an error names each conversation
    template:str=None, # Chat template; the tokenizer's where None
): # Yields lists of texts; for None the whole, the prompt before the last answer, `(begin, end)` of `{% generation %}` marks
    "What a chat template writes of conversations, within limits, some hundreds at a time."
    template,names = template or tok.chat_template,iter(names)
    how = [template, tok.special_tokens_map, bool(_GENERATION.search(template))]
    def text(said):
        name = next(names)
        if isinstance(said, list): return said[0][0] if len(said[0])==1 else (*said[0], said[1])
        why,fix = f"refuses it ({excerpt(said or '', 100)})","correct it, or choose another model"
        if said is None: why = f"takes more than {RENDER_SECONDS} seconds or {RENDER_MIB} MiB for it"
        raise UserError(name, f"the chat template {why}", fix)
    for lot in _ahead(how, _in_lines(chats)): yield list(map(text, lot))

def render_chats(*args)->list: # Texts
    "All that `render_lots` yields, in one list."
    return [*chain.from_iterable(render_lots(*args))]

_PRIVATE = re.compile('[\U000F0000-\U0010FFFF]') # planes 15 and 16

_MARKS = re.compile('([\U00100000-\U0010FFFF])')

def mark_contents(
    messages:list, # Checked conversation
)->list: # The same conversation, marked
    "Put a private character before and after what each turn says."
    marked = []
    for i,m in enumerate(messages):
        text = m['content']
        core = text.strip() or text
        before,_,after = text.partition(core)
        marked.append(m | dict(content=f"{before}{chr(0x100000+2*i)}{core}{chr(0x100001+2*i)}{after}"))
    return marked

def _refuse_private(messages):
    if any(_PRIVATE.search(m['content']) for m in messages):
        raise UserError("a conversation", "it holds characters of Unicode's planes 15 and 16, which mark places here",
            "remove them")

def _check_places(
    messages:list, # Conversation
    codes:list, # Which marks a template wrote
):
    found = sorted(codes)
    for i,m in enumerate(messages):
        if found[2*i:2*i+2]!=[2*i, 2*i+1]:
            raise UserError("a conversation", f"the chat template leaves out, repeats or rewrites turn {i} ({m['role']})",
                "leave out that turn, or choose another model")
    if any(a%2 or b!=a+1 for a,b in zip(codes[::2], codes[1::2])):
        raise UserError("a conversation", "the chat template writes one turn into another", "choose another model")

def _write(tok, messages, ask=False): return render_chats(tok, [(messages, ask)], ["a conversation"])[0]

def split_rendered(
    tok, # Tokenizer with a chat template
    messages:list, # Checked conversation
)->tuple: # What the template writes before, between and after the turns; what the turns hold; which turn each is
    "Cut a rendered conversation into what the template wrote and what people wrote."
    _refuse_private(messages)
    both = [(mark_contents(messages), False), (messages, False)]
    marked,bare = render_chats(tok, both, ["a conversation"]*2)
    parts = _MARKS.split(marked)
    codes = [ord(c)-0x100000 for c in parts[1::2]]
    _check_places(messages, codes)
    if ''.join(parts[::2])!=bare:
        raise UserError("a conversation", "the chat template changes a text by what it holds", "choose another model")
    return parts[::4],parts[2::4],[c//2 for c in codes[::2]]

PROBE = [dict(role=role, content=text) for role,text in
    (('user','Tide?'), ('assistant','High.'), ('user','Ferry?'), ('assistant','Late.'))]

def _any_of(texts): return '|'.join(map(re.escape, sorted(texts, key=len, reverse=True))) or '(?!)'

def answer_end(
    tok, # Tokenizer with a chat template
    stops:tuple=(), # Tokens at which its model stops, as texts
)->str: # A control token
    "The token with which a chat template ends every answer."
    texts,_,turns = split_rendered(tok, PROBE)
    ends = [texts[turns.index(i)+1] for i in (1,3)]
    for t in filter(None, [tok.eos_token, *stops]):
        if all(t in e for e in ends) and ends[0].partition(t)[0]==ends[1].partition(t)[0]: return t
    token = _any_of([t.content for t in tok.added_tokens_decoder.values()])
    after = [re.match(rf'(?:\s|{token})*', e)[0] for e in ends]
    both = [a for a,b in takewhile(lambda ab: ab[0]==ab[1], zip(*(re.findall(token, a) for a in after)))]
    if both: return next(t for t in [tok.eos_token, *stops, both[-1]] if t in both)
    raise UserError("a chat template",
        f"it ends answers with {excerpt(after[0], 40)!r} and {excerpt(after[1], 40)!r}, and no control token is in both",
        "choose another model")

def control_tokens(
    tok, # Tokenizer
)->dict: # {text: id}
    "The tokens that no text may become: special ones, and the one that ends an answer."
    return {t.content:i for i,t in tok.added_tokens_decoder.items() if t.special or t.content==tok.eos_token}

def _cuts(tok):
    "A pattern of the control tokens at which a tokenizer cuts a text, and reads the pieces one by one."
    added = [t for t in tok.added_tokens_decoder.values() if not t.normalized] # others are looked for in the pieces
    if any(t.single_word or t.lstrip for t in added): added = [] # these look at the text before them
    return re.compile(_any_of([t.content for t in added]))

_GPT = [rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{n}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for n in (r'\p{N}', r'\p{N}{1,3}')] # patterns of Qwen 2 and Llama 3

_WORDS = re.compile(' (?<=[A-Za-z] )(?=[A-Za-z])')

def words_apart(
    rust, # A tokenizer of the `tokenizers` library
)->bool: # Is every text cut before a space between two letters, and each part read as if it were alone?
    "Does a tokenizer read word for word? Known are byte-level ones that cut by the pattern of GPT-2, Qwen 2 or Llama 3."
    if type(rust.model).__name__!='BPE' or not rust.pre_tokenizer: return False
    if rust.normalizer and type(rust.normalizer).__name__!='NFC': return False
    step = json.loads(rust.pre_tokenizer.__getstate__())
    steps,cuts = step.get('pretokenizers', [step]),False
    for s in steps:
        known = s['type']=='Split' and s['pattern'].get('Regex') in _GPT and s['behavior']=='Isolated' and not s['invert']
        bytes_ = s['type']=='ByteLevel' and not s['add_prefix_space']
        if not (known or bytes_ or s['type']=='Digits'): return False
        cuts = cuts or known or bytes_ and s['use_regex']
    return cuts

class OwnFormat:
    "How a tokenizer's own chat template writes conversations."
    def __init__(self,
        tok, # Tokenizer whose `eos_token` ends an answer
    ):
        self.tok,self.eos,self.control = tok,tok.eos_token,control_tokens(tok)
        self.names = {t:chr(0xF0000+i) for i,t in enumerate(self.control)} # private ones
        self.pattern,self.ids = re.compile(_any_of(self.control)),set(self.control.values())
        self.cuts,self.marked = _cuts(tok),bool(_GENERATION.search(tok.chat_template))
        self.shapes,self.slots,self.words,self.held = {},{},{},0 # see `shape` and `learn`
        self.lock = threading.Lock() # of these
        added = tok.added_tokens_decoder.values() # some take white space, or are looked for within pieces
        self.apart = words_apart(tok.backend_tokenizer) and not any(t.rstrip or t.normalized for t in added)

def _begins(
    before:str, # What the template writes before an answer
    asked:str, # What it asks for an answer with
    turn:int, # Of the answer
    last:bool, # Is it the last answer?
)->int: # Where in `before` the answer begins
    bare = before.lstrip()
    n = len(commonprefix([bare, asked]))
    early = not last and asked.startswith(bare.rstrip()) # an empty thought stands only before the last answer
    if n==len(asked) or early: return len(before)-len(bare)+n
    raise UserError("a conversation",
        f"turn {turn}: the chat template asks for an answer with {asked[-40:]!r}, and writes one after {bare[-40:]!r}",
        "choose another model")

@patch
def answers(self:OwnFormat,
    messages:list, # Checked conversation
    texts:list, # What the template writes, from `split_rendered`
    turns:list, # Which turn each content is
)->list: # `(content's number, begin in the text before it, place of the end token in the text after it)`
    "Where the answers of a conversation are."
    at = [j for j,t in enumerate(turns) if messages[t]['role']=='assistant']
    if at!=sorted(at, key=turns.__getitem__):
        raise UserError("a conversation", "the chat template changes the order of the answers", "choose another model")
    asked = _MARKS.split(_write(self.tok, mark_contents(messages[:turns[at[-1]]]), ask=True))[-1].lstrip()
    if not asked:
        raise UserError("a conversation", "the chat template writes nothing between a question and its answer",
            "choose another model")
    found = []
    for j in at:
        if (end := texts[j+1].find(self.eos))<0:
            raise UserError("a conversation",
                f"turn {turns[j]}: the chat template goes on with {excerpt(texts[j+1], 40)!r}, not with {self.eos!r}",
                "choose another model")
        begin = _begins(texts[j], asked, turns[j], j==at[-1])
        if self.eos in texts[j][begin:]:
            raise UserError("a conversation", f"turn {turns[j]}: the chat template begins the answer with {self.eos!r}, "
                "which ends answers", "choose another model")
        found.append((j, begin, end))
    return found

class Shape(namedtuple('Shape', 'written turns answers forms', defaults=[None])):
    "What a template writes around the texts of a conversation, which turn each text is, and the places of answers."
    def fill(self,
        contents:list, # Texts in the order in which they are written
    )->tuple: # Whole text, and where each text that somebody wrote begins
        "Put texts in their places."
        pieces = [*chain.from_iterable(zip(self.written, contents)), self.written[-1]]
        return ''.join(pieces),[*accumulate(map(len, pieces))][::2]

    def spans(self,
        contents:list, # Texts in the order in which they are written
        begins:list, # Where each begins, from `fill`
    )->list: # `(begin, place of the end token)` of each answer
        "Where the answers are."
        return [(begins[j]-len(self.written[j])+at, begins[j]+len(contents[j])+end) for j,at,end in self.answers]

@patch
def find_shape(self:OwnFormat,
    messages:list, # Checked conversation
)->tuple: # Shape, and the texts to fill it with
    "Learn from marks how the template writes a conversation."
    texts,contents,turns = split_rendered(self.tok, messages)
    return Shape(texts, turns, self.answers(messages, texts, turns)),contents

@patch
def shape(self:OwnFormat,
    messages:list, # Checked conversation
)->Shape: # None where the template refuses such a conversation
    "How the template writes conversations with these roles; it is learnt once."
    roles = tuple(m['role'] for m in messages)
    if roles not in self.shapes:
        try: self.shapes[roles] = self.find_shape([dict(role=r, content='x') for r in roles])[0]._replace(forms={})
        except UserError: self.shapes[roles] = None
    return self.shapes[roles]

@patch
def private(self:OwnFormat): # Tokenizer of the `tokenizers` library
    "A copy of the tokenizer whose control tokens have private names; it is made once."
    from tokenizers import Tokenizer
    if hasattr(self, 'copy'): return self.copy
    d = json.loads(self.tok.backend_tokenizer.to_str())
    model,new = d['model'],self.names
    for t in d['added_tokens']: t['content'] = new.get(t['content'], t['content'])
    if isinstance(model['vocab'], dict): model['vocab'] = {new.get(k,k):v for k,v in model['vocab'].items()}
    else: model['vocab'] = [[new.get(k,k),score] for k,score in model['vocab']]
    if model.get('unk_token') in new: model['unk_token'] = new[model['unk_token']]
    with reading(f"tokenizer {self.tok.name_or_path!r}: a text names one of its control tokens, which"):
        self.copy = Tokenizer.from_str(json.dumps(d | dict(post_processor=None, truncation=None, padding=None)))
    return self.copy

@patch
def check_marks(self:OwnFormat,
    messages:list, # Checked conversation
    text:str, # What the template writes of it
    marks:list, # `(begin, end)` of its `{% generation %}` marks
    shape:Shape, # How it is written
    contents:list, # The texts in it
    begins:list, # Where they begin
):
    "Refuse a conversation that the template's own marks label in another way."
    joined = []
    for x,y in sorted(marks): joined = [*joined[:-1], [joined[-1][0], y]] if joined and joined[-1][1]>=x else [*joined, [x,y]]
    def inside(a, b): return any(x<=a and b<=y for x,y in joined)
    spans = [(a, b+len(self.eos)) for a,b in shape.spans(contents, begins)]
    said = [(a, a+len(c)) for a,c,t in zip(begins, contents, shape.turns) if messages[t]['role']!='assistant']
    own = [(a+len(t)-len(t.lstrip()), b) for a,b in spans for t in [text[a:b]]] # marks may leave white space out
    if not all(inside(a, b) for a,b in own) or any(x<b and a<y for a,b in said for x,y in marks):
        raise UserError("a conversation", "the template's {% generation %} marks don't cover its answers and what ends them, "
            "or cover more", "choose another model")

ASKED_ELSE = "give a system turn to conversations without one (SYSTEM_PROMPT, --system_prompt), or choose another model"

def _check_asked(
    before:str, # What a template writes before the last answer
    asked:str, # What it asks for this answer with
):
    if before==asked: return
    n = max(0, len(commonprefix([before, asked]))-10)
    raise UserError("a conversation", f"the chat template writes {excerpt(asked[n:], 60)!r} "
        f"where an answer is asked for, and {excerpt(before[n:], 60)!r} in its place where the answer follows", ASKED_ELSE)

@patch
def place(self:OwnFormat,
    messages:list, # Checked conversation
    bare:str, # What the template writes of it
    asked:str, # What it writes to ask for the last answer
    marks:list, # `(begin, end)` of its `{% generation %}` marks
)->tuple: # Shape, the texts that fill it, and where they begin
    "Find the shape that writes a conversation as its template does."
    def equal(shape, contents):
        text,begins = shape.fill(contents)
        if text==bare and text[:shape.spans(contents, begins)[-1][0]]==asked: return shape,contents,begins
    found,shape = None,self.shape(messages)
    if shape:
        kept = [messages[t]['content'] for t in shape.turns]
        found = equal(shape, kept) or equal(shape, [t.strip() for t in kept]) # many templates trim
    if not found:
        shape,contents = self.find_shape(messages)
        text,begins = shape.fill(contents)
        _check_asked(text[:shape.spans(contents, begins)[-1][0]], asked)
        found = shape,contents,begins
    if marks or self.marked: self.check_marks(messages, bare, marks, *found)
    return found

@patch
def layout(self:OwnFormat,
    messages:list, # Checked conversation
    bare:str, # What the template writes of it
    shape:Shape, # How it is written
    contents:list, # The texts in it
    begins:list, # Where they begin
)->tuple: # Text; is it for the private tokenizer; number of control tokens; `(begin, end token's place)` of each answer that is learnt
    "Say where in a written conversation the answers are."
    shape = shape._replace(answers=[a for a in shape.answers if is_learnt(messages[shape.turns[a[0]]])])
    controls = sum(len(self.pattern.findall(t)) for t in shape.written)
    if not any(map(self.pattern.search, contents)): return bare,False,controls,shape.spans(contents, begins)
    _refuse_private(messages)
    def named(t): return self.pattern.sub(lambda m: self.names[m[0]], t)
    def at(text, place): return len(named(text[:place]))
    answers = [(j, at(shape.written[j], a), at(shape.written[j+1], b)) for j,a,b in shape.answers]
    shape = Shape([*map(named, shape.written)], shape.turns, answers)
    text,begins = shape.fill(contents)
    return text,True,controls,shape.spans(contents, begins)

@patch
def read(self:OwnFormat,
    texts:list, # Texts as they are written
    spoofed:bool=False, # With the private tokenizer
)->list: # Encodings of the `tokenizers` library
    "Tokenise texts in one batch."
    rust = self.private() if spoofed else self.tok.backend_tokenizer
    with reading(f"tokenizer {self.tok.name_or_path!r}: a text"): return rust.encode_batch(texts, add_special_tokens=False)

JOINED_START = "the tokenizer joins the beginning of an answer with what the chat template writes before it"

_JOINED = "its texts and the chat template join into a control token"

@patch
def first_token(self:OwnFormat,
    e, # Encoding of the `tokenizers` library
    begin:int, # Where an answer begins in its text
    length:int, # Of the text
)->int: # Index of its first token; the number of tokens where it has none in this text
    "Find the token that an answer begins with."
    begin = next((k for k in range(begin, length) if e.char_to_token(k) is not None), None)
    if begin is None: return len(e.ids)
    i = e.char_to_token(begin)
    if e.token_to_chars(i)[0]==begin: return i
    if e.ids[i] in self.ids: return i+1 # a control token that takes the white space after it
    raise UserError("a conversation", JOINED_START, "remove the white space at its beginning")

@patch
def label(self:OwnFormat,
    e, # Encoding of a conversation
    controls:int, # How many control tokens the template wrote
    spans:list, # `(begin, place of the end token)` of each answer
)->tuple: # `input_ids` and mask
    "Mark the answers among the tokens, and check that all control tokens are the template's."
    ids = e.ids
    if sum(map(self.ids.__contains__, ids))!=controls: raise UserError("a conversation", _JOINED, "change the texts")
    mask = [0]*len(ids)
    for begin,end in spans:
        first,last = self.first_token(e, begin, end),e.char_to_token(end)
        if last is None or ids[last]!=self.control[self.eos]:
            raise UserError("a conversation", f"an answer doesn't end in {self.eos!r}", "choose another model")
        mask[first:last+1] = [1]*(last+1-min(first,last))
    return ids,mask

class Slot:
    "The place of a text between two control tokens."
    def __init__(self,
        before:str, # What the template writes from the last control token to the text
        after:str, # From the text to the next control token
        token:str, # That token; '' at the end
        begin:int, # Where an answer begins in `before`; None where the text is none
    ):
        self.before,self.after,self.token = before,after,token
        self.begin = begin
        self.known = {} # {text: its ids with those around it, and where the answer begins among them; None where it has none}

@patch
def cut_words(self:OwnFormat,
    text:str,
)->list: # Texts that the tokenizer reads one by one
    "Cut a text before its words, where its tokenizer always does."
    if not self.apart: return [text]
    first,*rest = _WORDS.split(text)
    return [first, *(' '+w for w in rest)]

@patch
def first_in(self:OwnFormat,
    words:list, # From `cut_words`
    begin:int, # Where an answer begins in their text
)->int: # Index of its first token
    "Find the token that an answer begins with."
    at = before = 0
    for w in words:
        ids,e = self.words[w]
        if begin<at+len(w): return before+self.first_token(e, begin-at, len(w))
        at,before = at+len(w),before+len(ids)
    return before

@patch
def ids_in(self:OwnFormat,
    slot:Slot,
    text:str, # In it
    words:list, # Of the slot with the text; each is in `words` of the format
)->tuple: # Ids, and how many come before an answer; None where the text must be read with its conversation
    "Tokens of a slot with its text."
    before = slot.before
    whole = before+text+slot.after
    here = [m.start() for m in self.cuts.finditer(whole+slot.token)]
    if here!=[m.start() for m in self.cuts.finditer(before)]+[len(whole)]*bool(slot.token): return None
    ids = [*chain.from_iterable(self.words[w][0] for w in words)]
    controls = len(self.pattern.findall(before+slot.after))
    if self.pattern.search(text) or sum(map(self.ids.__contains__, ids))!=controls: return None
    if slot.begin is None: return ids,len(ids)
    try: return ids,self.first_in(words, slot.begin)
    except UserError: return None # it is said of the conversation

MOST_HELD = 2_000_000 # tokens of texts that are kept, for when they come back

@patch
def forget(self:OwnFormat):
    "Forget all texts where there are too many of them."
    if self.held<=MOST_HELD: return
    self.held = 0
    self.words.clear()
    for slot in self.slots.values(): slot.known.clear()

@patch
def learn(self:OwnFormat,
    new:list, # Pairs of a slot and a text that is new in it
):
    "Read texts in one batch, equal words of them once."
    cut = [self.cut_words(slot.before+c+slot.after) for slot,c in new]
    fresh = [w for w in dict.fromkeys(chain.from_iterable(cut)) if w not in self.words]
    for w,e in zip(fresh, self.read(fresh)):
        self.words[w] = e.ids,e
        self.held += len(e.ids)
    for (slot,c),words in zip(new, cut):
        slot.known[c] = found = self.ids_in(slot, c, words)
        if found: self.held += len(found[0])

def _edges(
    shape:Shape,
    cuts, # Pattern of the control tokens at which a tokenizer cuts
)->list: # For each text of the template, where its first and its last control token begin; None where texts meet between two
    at = [[m.start() for m in cuts.finditer(t)] for t in shape.written]
    if not all(at[1:-1]): return None
    first,last = at[0] or [0],at[-1] or [len(shape.written[-1])]
    return [(0, first[-1]), *((a[0], a[-1]) for a in at[1:-1]), (last[0], len(shape.written[-1]))]

@patch
def make_form(self:OwnFormat,
    shape:Shape, # With the answers that are learnt
)->list: # `(ids, mask, slot)`: tokens of the template, and the slot after them; None where texts can't be read one by one
    "Tokenise what a template writes around texts."
    if not (edges := _edges(shape, self.cuts)): return None
    fixed = [t[a:b] for t,(a,b) in zip(shape.written, edges)]
    read = self.read(fixed)
    masks,begins = [[0]*len(e.ids) for e in read],[None]*len(shape.turns)
    for j,at,end in shape.answers:
        (low,high),(next_low,_) = edges[j],edges[j+1]
        begins[j] = max(at-high, 0)
        if at<high: # what the answer begins with is the template's
            first = self.first_token(read[j], at-low, high-low)
            masks[j][first:] = [1]*(len(masks[j])-first)
        last = read[j+1].char_to_token(end-next_low) if end>=next_low else None
        if last is None or read[j+1].ids[last]!=self.control[self.eos]: return None
        masks[j+1][:last+1] = [1]*(last+1)
    slots = []
    for j,begin in enumerate(begins):
        token = self.cuts.match(shape.written[j+1], edges[j+1][0])
        key = shape.written[j][edges[j][1]:],shape.written[j+1][:edges[j+1][0]],token[0] if token else '',begin
        slots.append(self.slots.setdefault(key, Slot(*key)))
    return [*zip((e.ids for e in read), masks, [*slots, None])]

@patch
def form(self:OwnFormat,
    messages:list, # Checked conversation
    shape:Shape, # How it is written
)->list: # See `make_form`; None for a shape that only this conversation has
    "The tokens around the texts of a conversation; they are read once for each sequence of roles."
    if shape.forms is None: return None
    learnt = tuple(map(is_learnt, messages))
    if learnt not in shape.forms:
        shape.forms[learnt] = self.make_form(shape._replace(answers=[a for a in shape.answers if learnt[shape.turns[a[0]]]]))
    return shape.forms[learnt]

def fill_form(
    form:list, # From `OwnFormat.form`
    contents:list, # Texts that `learn` has read
)->tuple: # `input_ids` and mask; None where a text must be read with its conversation
    "Put the ids of texts between those of a template."
    if not form: return None
    ids,mask = [],[]
    for (fixed,labels,slot),c in zip(form, [*contents, None]):
        ids += fixed; mask += labels
        if not slot: return ids,mask
        if not (found := slot.known[c]): return None
        new,first = found
        ids += new
        mask += [0]*first+[1]*(len(new)-first)

@lru_cache(8)
def _own_format(tok, template, special): return OwnFormat(tok) # made again where one of them has changed

_making = threading.Lock() # else two threads would make one each, and learn all twice

def own_format(
    tok, # Tokenizer from `load_tokenizer`
)->OwnFormat:
    "How a tokenizer's template writes conversations, as far as it is known by now."
    with _making: return _own_format(tok, tok.chat_template, json.dumps(tok.special_tokens_map))

@patch
def encode(self:OwnFormat,
    chats:list, # Checked conversations
    written:list, # What the template writes of them, from `render_lots`
    names:list, # How an error names each
)->list: # Pairs of `input_ids` and mask
    "Encode conversations that were rendered."
    def of(i, f, *args):
        try: return f(*args)
        except UserError as e: raise UserError(names[i], e.value, e.remedy) from None
    placed = [of(i, self.place, c, *w) for i,(c,w) in enumerate(zip(chats, written))]
    formed = [(of(i, self.form, c, p[0]), p[1]) for i,(c,p) in enumerate(zip(chats, placed))]
    self.forget()
    new = dict.fromkeys((slot,c) for form,texts in formed if form for (_,_,slot),c in zip(form, texts) if c not in slot.known)
    self.learn(list(new))
    out = [fill_form(*f) for f in formed]
    laid = {i: of(i, self.layout, chats[i], written[i][0], *placed[i]) for i,o in enumerate(out) if not o}
    for spoofed in (False, True):
        idx = [i for i,l in laid.items() if l[1]==spoofed]
        for i,e in zip(idx, self.read([laid[i][0] for i in idx], spoofed) if idx else []):
            out[i] = of(i, self.label, e, *laid[i][2:])
    return out

def encode_own(
    tok, # Tokenizer from `load_tokenizer`
    chats:list, # Checked conversations
    names:list, # How an error names each
)->list: # Pairs of `input_ids` and mask (1 where the loss looks), lists of int of equal length
    "Encode conversations as the tokenizer's own chat template writes them."
    own,out = own_format(tok),[]
    for written in render_lots(tok, [(c,None) for c in chats], names):
        part = slice(len(out), len(out)+len(written))
        with own.lock: out += own.encode(chats[part], written, names[part])
    return out

_DAY = '2026-01-01' # what templates are told that it is

_NOW = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<format>[^'"]*)(?P=quote)\s*\)""")

def settle_template(
    template:str, # A model's own
)->tuple: # The template; what was settled, as sentences
    "Take the date out of a chat template."
    from datetime import date
    new = _NOW.sub(lambda m: json.dumps(date.fromisoformat(_DAY).strftime(m['format'])), template)
    if re.search(r'strftime_now\s*\(', new):
        raise UserError("a chat template", "it asks for the date in a way that can't be pinned", "choose another model")
    return new,[f"the date in its chat template is {_DAY}"] if new!=template else []

def put_before(
    template:str, # Chat template
    statement:str, # Jinja; nothing is written of it
)->str: # A template that writes the same, unless the statement changes it
    "Have a chat template begin with a statement."
    rest = template.lstrip()
    space = template[:len(template)-len(rest)]
    if re.match(r'\{[%{#]-', rest): space = '' # Jinja takes it away
    elif re.match(r'\{[%#][^+]', rest): space = space.rstrip(' \t') # as transformers sets it (lstrip_blocks)
    return statement + (f"{{{{ {json.dumps(space)} }}}}" if space else '') + rest

def skip_thoughts(
    tok, # Tokenizer, changed
)->list: # What was settled, as sentences
    "Have a thinking model's template ask for answers without a thought, where it writes them so and all else stays."
    template = tok.chat_template
    if 'enable_thinking' not in template: return []
    before = _write(tok, PROBE)
    tok.chat_template = put_before(template, '{%- set enable_thinking = false -%}')
    asked = _write(tok, PROBE[:-1], ask=True)
    if _write(tok, PROBE)==before and before.startswith(asked): return ["answers are asked for without a thought (enable_thinking=false)"]
    tok.chat_template = template
    return []

# ------------------------------------------------------------------------------
# chat.templates: Chat formats, their Jinja templates, and tokenizers from untrusted folders
# ------------------------------------------------------------------------------

def _joined_system(messages): return "\n\n".join(m['content'] for m in messages if m['role']=='system')

def mistral_v1_parts(
    messages:list, # Checked conversation
    ids:list, # Of `<s>` and `</s>`
): # Yields `(part, supervised)`
    "Mistral v1: markers are text; the system text opens the first user turn."
    bos,eos = ids
    system,first = _joined_system(messages),True
    yield bos, False
    for m in messages:
        if m['role']=='user':
            text = f"{system}\n\n{m['content']}" if system and first else m['content']
            yield f"[INST] {text} [/INST]", False
            first = False
        elif m['role']=='assistant': yield from ((m['content'],is_learnt(m)), (eos,is_learnt(m)))

def mistral_v3_parts(
    messages:list, # Checked conversation
    ids:list, # Of `<s>`, `</s>`, `[INST]` and `[/INST]`
): # Yields `(part, supervised)`
    "Mistral v2 and v3: markers are control tokens; the system text opens the *last* user turn."
    bos,eos,inst,end_inst = ids
    system = _joined_system(messages)
    last = max(i for i,m in enumerate(messages) if m['role']=='user')
    yield bos, False
    for i,m in enumerate(messages):
        if m['role']=='user':
            text = f"{system}\n\n{m['content']}" if system and i==last else m['content']
            yield from ((inst,False), (text,False), (end_inst,False))
        elif m['role']=='assistant': yield from ((m['content'].rstrip(' '),is_learnt(m)), (eos,is_learnt(m)))

def mistral_v7_parts(
    messages:list, # Checked conversation
    ids:list, # Of v3's tokens, `[SYSTEM_PROMPT]` and `[/SYSTEM_PROMPT]`
): # Yields `(part, supervised)`
    "Mistral v7 to v13: the system turn has control tokens of its own and stays where it is."
    bos,eos,inst,end_inst,sys,end_sys = ids
    yield bos, False
    for m in messages:
        if m['role']=='assistant': yield from ((m['content'].rstrip(' '),is_learnt(m)), (eos,is_learnt(m)))
        else:
            a,b = (sys,end_sys) if m['role']=='system' else (inst,end_inst)
            yield from ((a,False), (m['content'],False), (b,False))

def mistral_v15_parts(
    messages:list, # Checked conversation
    ids:list, # Of v7's tokens, `[MODEL_SETTINGS]` and `[/MODEL_SETTINGS]`
    settings:str, # The model's settings, as JSON
): # Yields `(part, supervised)`
    "Mistral v15: as v7, with the model's settings before the first user turn."
    *v7,begin,end = ids
    for p,sup in mistral_v7_parts(messages, v7):
        if p==v7[2] and settings: # [INST]
            yield from ((begin,False), (settings,False), (end,False))
            settings = None
        yield p,sup

_V3_TOKENS = ('<s>','</s>','[INST]','[/INST]')

_V7_TOKENS = (*_V3_TOKENS, '[SYSTEM_PROMPT]','[/SYSTEM_PROMPT]')

FORMATS = { # parts, control tokens (the second ends an answer)
    'mistral-v15': (mistral_v15_parts, (*_V7_TOKENS, '[MODEL_SETTINGS]','[/MODEL_SETTINGS]')),
    'mistral-v7': (mistral_v7_parts, _V7_TOKENS),
    'mistral-v3': (mistral_v3_parts, _V3_TOKENS),
    'mistral-v1': (mistral_v1_parts, ('<s>','</s>')),
}

CHAT_TEMPLATES = { # the files of chat/formats
    'mistral-v1': r'''{#- Mistral v1: markers are text; the system text opens the first user turn. -#}
{%- set system = messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\n\n') -%}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list -%}
{{- bos_token -}}
{%- for m in messages -%}
    {%- if m.role == 'assistant' -%}
        {{- ' ' + m.content + eos_token -}}
    {%- elif m.role == 'user' -%}
        {{- '[INST] ' + (system + '\n\n' if system and m is sameas users[0] else '') + m.content + ' [/INST]' -}}
    {%- endif -%}
{%- endfor -%}
''',
    'mistral-v15': r'''{#- Mistral v15: as v7, with `model_settings` (JSON, set in a line above this one) before the first user turn. -#}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list -%}
{{- bos_token -}}
{%- for m in messages -%}
    {%- if m is sameas users[0] -%}
        {{- '[MODEL_SETTINGS]' ~ model_settings ~ '[/MODEL_SETTINGS]' -}}
    {%- endif -%}
    {%- if m.role == 'assistant' -%}
        {{- m.content.rstrip(' ') + eos_token -}}
    {%- elif m.role == 'system' -%}
        {{- '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' -}}
    {%- else -%}
        {{- '[INST]' + m.content + '[/INST]' -}}
    {%- endif -%}
{%- endfor -%}
''',
    'mistral-v3': r'''{#- Mistral v2 and v3: markers are control tokens; the system text opens the last user turn. -#}
{%- set system = messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\n\n') -%}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list -%}
{{- bos_token -}}
{%- for m in messages -%}
    {%- if m.role == 'assistant' -%}
        {{- m.content.rstrip(' ') + eos_token -}}
    {%- elif m.role == 'user' -%}
        {{- '[INST]' + (system + '\n\n' if system and m is sameas users[-1] else '') + m.content + '[/INST]' -}}
    {%- endif -%}
{%- endfor -%}
''',
    'mistral-v7': r'''{#- Mistral v7 to v13: a system turn has control tokens of its own and stays where it is. -#}
{{- bos_token -}}
{%- for m in messages -%}
    {%- if m.role == 'assistant' -%}
        {{- m.content.rstrip(' ') + eos_token -}}
    {%- elif m.role == 'system' -%}
        {{- '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' -}}
    {%- else -%}
        {{- '[INST]' + m.content + '[/INST]' -}}
    {%- endif -%}
{%- endfor -%}
''',
}

OWN = 'own template' # the format of a model that isn't Mistral's

def _mistral_format(
    tok, # Tokenizer
    version:int, # Of its tekken.json or SentencePiece model; 0 where none is known
    settings:str, # Model settings of its tekken.json, as JSON
)->str: # Key of `FORMATS`; '' where it can be none
    vocab,template = tok.get_vocab(),tok.chat_template or ''
    def has(*tokens): return all(t in vocab for t in tokens)
    if settings and has(*FORMATS['mistral-v15'][1]): return 'mistral-v15'
    if has(*_V3_TOKENS):
        v7 = version>=7 or (not version and has('[SYSTEM_PROMPT]') and (not template or '[SYSTEM_PROMPT]' in template))
        return 'mistral-v7' if v7 and has(*_V7_TOKENS) else 'mistral-v3'
    return 'mistral-v1' if has('<s>','</s>') and (version or '[INST]' in template) else ''

def _writes_alike(
    tok, # Tokenizer with a template of somebody's
    template:str, # That of one of Mistral's formats
)->bool: # Do both write the same, but for spaces?
    def written(t, chat): return render_chats(tok, [(chat,False)], [''], t)[0].replace(' ', '')
    for chat in ([dict(role='system', content='Be brief.'), *PROBE[:3]], PROBE[:3]):
        try: theirs = written(tok.chat_template, chat)
        except UserError: continue # some take no system turn
        return theirs==written(template, chat)
    return False

def chat_format(
    tok, # Tokenizer
    version:int=0, # Of its tekken.json or SentencePiece model; 0 where none is known
    settings:str=None, # Model settings of its tekken.json, as JSON
)->str: # Key of `FORMATS`, or `OWN`
    "Name the chat format that a tokenizer speaks."
    known = tok.init_kwargs.get('chat_format')
    if known==OWN and tok.chat_template: return OWN
    if known in [*FORMATS] and None not in map(tok.backend_tokenizer.token_to_id, FORMATS[known][1]): return known
    name = _mistral_format(tok, version, settings)
    if name and (not tok.chat_template or _writes_alike(tok, CHAT_TEMPLATES[name])): return name
    if tok.chat_template: return OWN
    raise UserError(f"tokenizer {tok.name_or_path!r}", "it has no chat template", "choose an instruct model")

def _pb_fields(
    b:bytes, # A protobuf message
): # Yields `(number, value)`: https://protobuf.dev/programming-guides/encoding
    "The fields of a protobuf message."
    i = 0
    def varint():
        nonlocal i
        v = shift = 0
        while True:
            c = b[i]; i += 1
            v |= (c&127)<<shift; shift += 7
            if c<128: return v
            if shift>63: raise ValueError("a number of more than 64 bits")
    while i<len(b):
        key = varint()
        if key&7==0: yield key>>3,varint(); continue
        n = {1:8, 5:4}.get(key&7) or varint()
        if n>len(b)-i: raise ValueError("it ends too early")
        yield key>>3,b[i:i+n]
        i += n

LONGEST_PIECE = 256 # characters; SentencePiece itself makes none of more than 16 unless told to

def read_pieces(
    path, # SentencePiece model
)->list: # (piece, score, type); types: 1 normal, 2 unknown, 3 control, 6 byte
    "The vocabulary of a SentencePiece model."
    with reading(f"SentencePiece model {Path(path).name}", 'download it again'):
        pieces = [dict(_pb_fields(v)) for f,v in _pb_fields(Path(path).read_bytes()) if f==1]
        read = [(p[1].decode(), struct.unpack('<f', p[2])[0] if 2 in p else 0., p.get(3,1)) for p in pieces]
        if not read: raise ValueError("no pieces")
        longest = max(len(p) for p,_,_ in read)
        if longest>LONGEST_PIECE: raise ValueError(f"a piece of more than {LONGEST_PIECE} characters")
    return read

def _as_sentencepiece(
    rust, # A tokenizer of the `tokenizers` library, changed
):
    "Put a space before every text, and write every space as ▁."
    from tokenizers import decoders, normalizers
    rust.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ','▁')])
    rust.pre_tokenizer = None
    steps = [decoders.Replace('▁',' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ',1,0)]
    rust.decoder = decoders.Sequence(steps)

def sentencepiece_tokenizer(
    path, # SentencePiece model of the BPE kind, without normalisation
): # `PreTrainedTokenizerFast` that gives the ids that sentencepiece gives
    "Read a SentencePiece model."
    from tokenizers import AddedToken, Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    pieces = read_pieces(path)
    vocab = {p:i for i,(p,_,_) in enumerate(pieces)}
    score = {p:s for p,s,kind in pieces if kind==1} # what isn't normal never comes of joining
    joins = [(l,r) for p in score for l,r in ((p[:i],p[i:]) for i in range(1,len(p))) if l in score and r in score]
    def best_first(join): # runs of ▁ share one score: the longer one on the left grows first
        return -score[join[0]+join[1]], -len(join[0])
    joins.sort(key=best_first)
    rust = Tokenizer(models.BPE(vocab, joins, unk_token='<unk>', fuse_unk=True, byte_fallback=True))
    rust.add_special_tokens([AddedToken(p, special=True, normalized=False) for p,_,kind in pieces if kind in (2,3)])
    _as_sentencepiece(rust)
    names = dict(bos_token='<s>', eos_token='</s>', unk_token='<unk>')
    return PreTrainedTokenizerFast(tokenizer_object=rust, **names, clean_up_tokenization_spaces=False)

TOKENIZER_FILES = ('tokenizer*', '*.model', '*.model.v*', 'tekken.json', 'config.json', 'vocab.*', 'merges.txt',
    '*tokens*.json', 'chat_template*', 'additional_chat_templates/*.jinja', 'generation_config.json')

def _tokenizer_folder(
    path:str, # Hub id or local folder
    revision:str, # Commit of the Hub repo, or None
)->Path: # Folder with the tokenizer's files
    if Path(path).is_dir(): return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    with asking_hub(f"tokenizer {path}"):
        try: return Path(snapshot_download(path, revision=revision, allow_patterns=TOKENIZER_FILES))
        except HFValidationError:
            raise UserError(f"tokenizer {path!r}", "no such folder here, and no name that a Hub repo may have",
                "check its spelling") from None

MOST_TOKENS = 10_000_000 # of a vocabulary; the largest public ones have 300,000

def _read_tekken(
    f:Path, # tekken.json, which may be missing
)->tuple: # Version (0 where there is no file); v15's default settings as the JSON that mistral-common writes, or None
    if not f.exists(): return 0,None
    d = read_json(f)
    with reading('tekken.json', 'download it again'):
        if any(isinstance(v, (int,float)) and v>MOST_TOKENS for v in d['config'].values()):
            raise ValueError('more tokens than any vocabulary has')
        version = int(d['config']['version'].lstrip('v').split('m')[0])
        effort = (d.get('model_settings_builder') or {}).get('reasoning_effort')
        return version,effort and json.dumps(dict(reasoning_effort=effort['default']))

MOST_GROWTH = 64 # characters that normalisation may make of one

_ESCAPES = re.compile(r'\\[pP]\{[^}]*\}|\\.|\[(?:\\.|[^\]\\])*\]') # escapes and character classes

_NESTED = re.compile(r'\)[*+{]|\)\?[*+{]|[*+}?][*{]') # a repeated group, or a repeat that is repeated

def _repeats_nest(
    part, # Of tokenizer.json: https://huggingface.co/docs/tokenizers/components
)->bool: # Has a pattern in it repeats within repeats?
    if isinstance(part, list): return any(map(_repeats_nest, part))
    if not isinstance(part, dict): return False
    bare = _ESCAPES.sub('x', str(part.get('Regex') or ''))
    return bool(_NESTED.search(bare)) or any(map(_repeats_nest, part.values()))

def _growth(
    part, # Of tokenizer.json
)->int: # Most characters that one becomes, steps after one another multiplied
    if isinstance(part, list): return math.prod(map(_growth, part))
    if not isinstance(part, dict): return 1
    return max(1, len(str(part.get('content') or '')))*math.prod(map(_growth, part.values()))

def _check_patterns(
    rust, # A tokenizer of the `tokenizers` library
    what:str, # How an error names it
):
    parts = [json.loads(part.__getstate__()) for part in (rust.normalizer, rust.pre_tokenizer) if part]
    if any(map(_repeats_nest, parts)) or _growth(parts)>MOST_GROWTH:
        raise UserError(what, "it cuts text by a pattern of repeats within repeats, "
            "or puts long text into it, which can take for ever", "choose another")

def open_tokenizer(
    folder:Path, # With the tokenizer's files
    what:str, # How an error names it
): # Tokenizer as transformers reads it
    "Load somebody else's tokenizer: no code of theirs, no file outside of the folder, no endless pattern."
    from transformers import AutoTokenizer
    f = folder/'tokenizer_config.json'
    cfg = read_json(f, what=f"{what}: {f.name}") if f.is_file() else {}
    if cfg.get('auto_map'): warn_custom_code(what)
    own = dict(tokenizer_file=folder/'tokenizer.json', merges_file=folder/'merges.txt')
    paths = [k for k in cfg if k.endswith('_file')] # of the machine where it was saved
    named = {k: str(own[k]) if k in own and own[k].is_file() else None for k in paths}
    with reading(what, 'download it again, or choose another'):
        tok = AutoTokenizer.from_pretrained(folder, mistral_format=False, trust_remote_code=False, **named)
        rust = tok.backend_tokenizer
        rust.no_padding(); rust.no_truncation()
        _check_patterns(rust, what)
    return tok

def vocabulary_size(
    tok, # Tokenizer
)->int: # One more than its largest id, which is more than `len(tok)` where ids are left out
    "How many rows a tokenizer needs of an embedding."
    return max(tok.get_vocab().values())+1

def check_vocabulary(
    tok_len:int, # Rows that the tokenizer needs, from `vocabulary_size`
    rows, # Rows that the embedding has, or the model's config
    name:str='tokenizer', # How an error names the tokenizer
):
    "Refuse a tokenizer that gives ids which the model doesn't have."
    if not isinstance(rows, int): rows = getattr(rows.get_text_config(), 'vocab_size', None)
    if not isinstance(rows, int):
        raise UserError(name, "the model's config.json says no size of a vocabulary", "choose another model")
    if tok_len>rows:
        raise UserError(name, f"it has {tok_len:,} tokens, and the model's embedding {rows:,} rows",
            "take the tokenizer that belongs to the model, or enlarge the model first (resize_token_embeddings)")

def _set_model_settings(
    tok, # Tokenizer with v15's template, changed
    settings:str, # JSON from its files
    what:str, # How an error names it
):
    if not (isinstance(settings, str) and re.fullmatch(r'{"reasoning_effort": "\w{1,20}"}', settings)):
        raise UserError(what, f"its model settings are {excerpt(settings, 60)!r}, where a reasoning effort belongs",
            "choose another")
    tok.init_kwargs['model_settings'] = settings
    tok.chat_template = f"{{%- set model_settings = {settings!r} -%}}\n{tok.chat_template}"

PADS = ('<pad>', '[PAD]', '<|pad|>', '<|endoftext|>', '<unk>', '<|end_of_text|>') # by preference

def _set_pad(
    tok, # Tokenizer, changed
    used:tuple=(), # Tokens that a conversation holds
):
    vocab,special = tok.get_vocab(),[t.content for t in tok.added_tokens_decoder.values() if t.special]
    free = [p for p in (tok.pad_token, *PADS, *special) if p in vocab and p!=tok.eos_token and p not in used]
    if not free:
        raise UserError(f"tokenizer {tok.name_or_path!r}", "it has no control token to pad with that ends no answer",
            "choose another model")
    tok.pad_token = free[0]

def _folder_template(
    folder:Path, # With a tokenizer's files
): # Chat template: text, a list of named ones, or None
    if (f := folder/'chat_template.jinja').is_file(): return f.read_text('utf-8', errors='replace')
    f = folder/'tokenizer_config.json'
    return read_json(f).get('chat_template') if f.is_file() else None

def _read_sentencepiece(
    folder:Path, # Without a tokenizer.json
    model:Path, # Its SentencePiece model
    what:str, # How an error names it
)->tuple: # Tokenizer, and the version of Mistral's format that the model's name says, or 0
    with reading(what): tok = sentencepiece_tokenizer(model)
    version = re.search(r'\.model\.v(\d+)', model.name)
    version = int(version[1]) if version else 0
    template = _folder_template(folder)
    if not template: return tok,version
    tok.chat_template = template if isinstance(template, str) else None
    mistral = isinstance(template, str) and chat_format(tok, version)!=OWN
    return (tok if mistral else open_tokenizer(folder, what)),version

def _read_tokenizer(
    folder:Path, # With a tokenizer's files
    what:str, # How an error names it
)->tuple: # Tokenizer, and the version of Mistral's format that a file's name says, or 0
    there = {f for f in ('tokenizer.json','tekken.json','vocab.json') if (folder/f).exists()}
    models = sorted(folder.glob('*.model*'))
    if models and not there-{'vocab.json'}: return _read_sentencepiece(folder, models[0], what)
    if there: return open_tokenizer(folder, what),0
    raise UserError(what, "no tokenizer.json, tekken.json or SentencePiece model that can be read there",
        "choose another, or add one")

def _check_folder(
    tok, # Tokenizer
    folder:Path, # Of its files, and perhaps of its model's
):
    from transformers import AutoConfig
    if not (folder/'config.json').exists(): return
    try:
        with reading('config.json'): cfg = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except UserError: return
    if not isinstance(getattr(cfg.get_text_config(), 'vocab_size', None), int): return
    check_vocabulary(vocabulary_size(tok), cfg, f"tokenizer {tok.name_or_path!r}")

def _one_template(
    tok, # Tokenizer
    what:str, # How an error names it
    name:str='', # Of the template to take
)->str: # Its chat template; '' where it has none
    t = tok.chat_template
    named = t if isinstance(t, dict) else {'default': t or ''}
    names = ', '.join(map(printable, named))
    if name and name not in named:
        raise UserError(what, f"it has no chat template {printable(name)!r}, but {names}", "choose one with --chat_template")
    if not name and len(named)>1 and 'default' not in named:
        raise UserError(what, f"it has several chat templates: {names}", "choose one with --chat_template")
    return named[name or ('default' if 'default' in named else next(iter(named)))]

def _declared_stops(
    tok, # Tokenizer
    folder:Path, # With the generation_config.json of its model, or without
)->list: # Tokens at which the model stops, as texts
    f = folder/'generation_config.json'
    ids = read_json(f).get('eos_token_id') if f.is_file() else None
    ids = [i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)]
    return [t.content for i,t in tok.added_tokens_decoder.items() if i in ids]

def _end_answers(
    tok, # Tokenizer with a chat template of its own, changed
    end:str, # The token that ends an answer
):
    old = tok.eos_token
    if end==old: return
    if old and 'eos_token' in tok.chat_template:
        set_old = f"{{%- set eos_token = {json.dumps(old, ensure_ascii=False)} -%}}"
        tok.chat_template = put_before(tok.chat_template, set_old)
    tok.eos_token = end

def _opening(
    tok, # Tokenizer with a chat template of its own
)->str: # What its template writes that nobody wrote, before a conversation without a system turn
    text = render_chats(tok, [(PROBE,False)], ["a conversation"])[0].partition(PROBE[0]['content'])[0]
    for t in tok.added_tokens_decoder.values(): text = text.replace(t.content, ' ')
    words = text.split()
    return ' '.join(words) if len(words)>2 else '' # more than the names of roles

NO_SYSTEM = 'none' # instead of a template's default system turn

_LEAVE_OUT = "give another --system_prompt, or leave it out"

def _system_statement(text): # Jinja
    turn = f"{{'role': 'system', 'content': {json.dumps(text, ensure_ascii=False)}}}"
    return f"{{%- if messages[0]['role']!='system' -%}}{{%- set messages = [{turn}] + messages -%}}{{%- endif -%}}"

def _set_system_turn(
    tok, # Tokenizer with a chat template of its own, changed
    system_prompt:str, # See `load_tokenizer`
    what:str, # How an error names it
)->list: # What was settled, as sentences
    none = system_prompt==NO_SYSTEM
    if not system_prompt: return []
    try:
        old = _opening(tok)
        if none and not old: return []
        tok.chat_template = put_before(tok.chat_template, _system_statement('' if none else system_prompt))
        said = _opening(tok)
    except UserError as e: raise UserError(what, e.value, _LEAVE_OUT) from None
    if none and said: raise UserError(what, f"it opens every conversation with {excerpt(said, 80)!r}", _LEAVE_OUT)
    if not none and ' '.join(system_prompt.split()) not in said:
        raise UserError(what, "its chat template leaves system turns out", "leave out --system_prompt")
    return [f"conversations without a system turn get {'none' if none else repr(excerpt(system_prompt, 80))}"
        + f" in the place of its chat template's {excerpt(old, 80)!r}"*bool(old)]

def _set_mistral_system(
    tok, # Tokenizer with one of Mistral's templates, changed; none of them writes a default
    system_prompt:str, # See `load_tokenizer`
):
    saved = tok.init_kwargs.pop('system_prompt', '')
    text = system_prompt or saved
    if text in ('', NO_SYSTEM): return
    tok.init_kwargs['system_prompt'] = text # saved with the tokenizer; see `encode_chats`
    tok.chat_template = put_before(tok.chat_template, _system_statement(text))
    log.info(f"conversations without a system turn get {excerpt(text, 80)!r}")

def _set_own_format(
    tok, # Tokenizer with a chat template of its own, changed
    folder:Path, # Of its files
    what:str, # How an error names it
    system_prompt:str='', # See `load_tokenizer`
):
    settled = _set_system_turn(tok, system_prompt, what)
    try:
        tok.chat_template,pinned = settle_template(tok.chat_template)
        settled += pinned + skip_thoughts(tok)
        _end_answers(tok, answer_end(tok, _declared_stops(tok, folder)))
        ids,_ = encode_own(tok, [PROBE], [what])[0]
    except UserError as e:
        raise UserError(what, e.value, ASKED_ELSE if e.remedy==ASKED_ELSE else "choose another model") from None
    _set_pad(tok, tok.convert_ids_to_tokens(ids))
    for s in settled: log.info(s)
    if not system_prompt and (said := _opening(tok)):
        log.info(f"its chat template opens conversations without a system turn with {excerpt(said, 80)!r}")

def _set_mistral_format(
    tok, # Tokenizer, changed
    name:str, # Key of `FORMATS`
    settings:str, # v15's model settings, as JSON
    what:str, # How an error names it
    system_prompt:str='', # See `load_tokenizer`
):
    theirs = tok.chat_template and not tok.chat_template.endswith(CHAT_TEMPLATES[name])
    if theirs and not system_prompt and (said := _opening(tok)):
        log.info("conversations without a system turn get none, as mistral-common gives them none; "
            f"the model's chat template would write {excerpt(said, 80)!r} (see SYSTEM_PROMPT)")
    tok.chat_template = CHAT_TEMPLATES[name]
    if name=='mistral-v15': _set_model_settings(tok, settings, what)
    _set_mistral_system(tok, system_prompt)
    if getattr(tok.backend_tokenizer.model, 'byte_fallback', False): _as_sentencepiece(tok.backend_tokenizer)
    tok.bos_token,tok.eos_token = FORMATS[name][1][:2]
    _set_pad(tok, FORMATS[name][1])

def load_tokenizer(
    path:str, # Hub id or local folder
    revision:str=None, # Commit of the Hub repo
    chat_template:str='', # Name of its chat template, where it has several
    system_prompt:str='', # System turn of conversations without one; '' keeps what the template writes, `none` takes it away
): # Tokenizer with the training chat template and `pad_token != eos_token`
    "Load a base model's tokenizer the same way whether or not mistral-common is installed."
    check_whole('--system_prompt', system_prompt)
    folder,what = _tokenizer_folder(path, revision),f"tokenizer {str(path)!r}"
    version,settings = _read_tekken(folder/'tekken.json')
    tok,named = _read_tokenizer(folder, what)
    tok.name_or_path,tok.chat_template = str(path),_one_template(tok, what, chat_template)
    settings = settings or tok.init_kwargs.pop('model_settings', None)
    name = tok.init_kwargs['chat_format'] = chat_format(tok, version or named, settings) # saved with the tokenizer
    if name==OWN: _set_own_format(tok, folder, what, system_prompt)
    else: _set_mistral_format(tok, name, settings, what, system_prompt)
    _check_folder(tok, folder)
    return tok

# ------------------------------------------------------------------------------
# chat.labels: Encode conversations, mark what the loss looks at, and check the labels of a dataset
# ------------------------------------------------------------------------------

def check_messages(
    messages:list, # Dicts with `role` (system, user, assistant), `content`, and `weight` 0 where it isn't learnt
    name:str='row', # How an error names the row
)->list: # The same; turns of one role in a row joined by a blank line, and nothing after the last answer that is learnt
    "Check one conversation and bring it into the form that every format can write."
    if fault := messages_fault(messages): raise UserError(name, *fault)
    out = []
    for m in messages:
        if out and out[-1]['role']==m['role']!='system': out[-1]['content'] += f"\n\n{m['content']}"
        else: out.append({k: m[k] for k in ('role','content')} | (dict(weight=0) if m.get('weight')==0 else {}))
    def last(wanted): return max((i for i,m in enumerate(out) if wanted(m)), default=-1)
    end = last(is_learnt)
    return out[:1+(last(lambda m: m['role']=='assistant') if end<0 else end)]

def _encode_texts(
    tok, # Tokenizer from `load_tokenizer`
    texts:list, # Different texts
)->dict: # {text: its ids}
    "Tokenise texts in one batch; what reads like a control token stays text."
    rust = tok.backend_tokenizer
    rust.encode_special_tokens = True
    try:
        with reading(f"tokenizer {tok.name_or_path!r}: a text"):
            return {t:e.ids for t,e in zip(texts, rust.encode_batch_fast(texts, add_special_tokens=False))}
    finally: rust.encode_special_tokens = False

def encode_chats(
    tok, # Tokenizer from `load_tokenizer`
    chats:list, # Conversations that passed `check_messages`
    names:list=None, # How an error names each; by their numbers where None
)->list: # Pairs of `input_ids` and `mask` (1 where the loss looks), lists of int of equal length
    "Encode conversations with their assistant masks, in one pass."
    name = chat_format(tok)
    if name==OWN: return encode_own(tok, chats, names or [f'conversation {i}' for i in range(len(chats))])
    parts_of,control = FORMATS[name]
    if system := tok.init_kwargs.get('system_prompt'): # for conversations without a system turn
        chats = [c if c[0]['role']=='system' else [dict(role='system', content=system), *c] for c in chats]
    args = [tok.convert_tokens_to_ids(list(control)), *filter(None, [tok.init_kwargs.get('model_settings')])]
    chats = [list(parts_of(c, *args)) for c in chats]
    texts = {p for c in chats for p,_ in c if isinstance(p, str)} # each once: headers and system turns come back
    ids_of = _encode_texts(tok, list(texts))
    out = []
    for c in chats:
        seq,mask = [],[]
        for p,sup in c:
            new = [p] if isinstance(p, int) else ids_of[p]
            seq += new; mask += [int(sup)]*len(new)
        out.append((seq,mask))
    return out

def trim_joined(
    tok, # Tokenizer from `load_tokenizer`
    chats:list, # Checked conversations
)->tuple: # The same; answers without white space before them where the tokenizer joins it; which these are (bool)
    "Remove white space that a model could not write as it was learnt."
    def joined(c):
        if not any(m['role']=='assistant' and m['content'][0].isspace() for m in c): return False
        try: encode_own(tok, [c], ['row'])
        except UserError as e: return e.value==JOINED_START # what else is wrong is said where all are encoded
        return False
    if chat_format(tok)!=OWN: return chats,[False]*len(chats)
    found = list(map(joined, chats))
    def bare(m): return m | dict(content=m['content'].lstrip()) if m['role']=='assistant' else m
    return [[*map(bare, c)] if f else c for c,f in zip(chats, found)],found

def encode_prompt(
    tok, # Tokenizer from `load_tokenizer`
    messages:list, # Conversation that ends with a user turn
)->list: # `input_ids` up to where the assistant begins to write
    "Encode a conversation that the model is to continue."
    ids,mask = encode_chats(tok, [check_messages([*messages, dict(role='assistant', content='x')], 'prompt')])[0]
    return ids[:max(i for i,m in enumerate(mask) if m and not mask[i-1])]

def takes_system(
    tok, # Tokenizer from `load_tokenizer`
)->bool: # As some templates, such as Gemma's first ones, don't
    "Does the chat template take a system turn?"
    try: encode_prompt(tok, [dict(role=r, content='x') for r in ('system','user')])
    except UserError: return False
    return True

def drop_exchanges(
    messages:list, # Checked conversation
    n:int=1, # How many, fewer than it has user turns
)->list: # The same from user turn `n` on, with all system turns
    "Shorten a conversation by its oldest exchanges."
    start = [i for i,m in enumerate(messages) if m['role']=='user'][n]
    return [m for m in messages[:start] if m['role']=='system'] + messages[start:]

def encode_fitting(
    tok, # Tokenizer from `load_tokenizer`
    chats:list, # Checked conversations
    max_length:int=2048, # Tokens a conversation may have
    names:list=None, # How an error names each
)->list: # `(input_ids, mask, exchanges lost)`, or None for a conversation that can't be made to fit
    "Encode conversations; those that are too long lose no more exchanges than they must."
    out = [(ids,mask,0) for ids,mask in encode_chats(tok, chats, names)]
    users = {i:sum(m['role']=='user' for m in chats[i]) for i,o in enumerate(out) if len(o[0])>max_length}
    span = {i:[1,n] for i,n in users.items()} # by bisection, so that a thousand exchanges take ten attempts
    while tries := {i:(a+b)//2 for i,(a,b) in span.items() if a<b}:
        shorter = encode_chats(tok, [drop_exchanges(chats[i], n) for i,n in tries.items()], names and [names[i] for i in tries])
        for (i,n),(ids,mask) in zip(tries.items(), shorter):
            if len(ids)<=max_length: out[i],span[i][1] = (ids,mask,n),n
            else: span[i][0] = n+1
    for i,n in users.items():
        if span[i][0]==n: out[i] = None
    return out

def _token_columns(
    rows:list, # Tuples of `input_ids`, mask and more
)->dict: # Arrow arrays `input_ids` and `labels`
    import numpy as np, pyarrow as pa
    ends = np.cumsum([0, *(len(r[0]) for r in rows)], dtype=np.int32)
    def flat(j, kind): return np.fromiter(chain.from_iterable(r[j] for r in rows), kind, ends[-1])
    def lists(values): return pa.ListArray.from_arrays(pa.array(ends), pa.array(values))
    ids = flat(0, np.int32)
    return dict(input_ids=lists(ids), labels=lists(np.where(flat(1, bool), ids, np.int32(-100))))

def _encode_batch(
    tok, # Tokenizer from `load_tokenizer`
    named:dict, # {how an error names the row: its checked conversation}
    max_length:int, # Tokens a conversation may have
)->'pyarrow.Table': # `input_ids`, `labels`, `lost` and `trimmed`, without the rows that can't be made to fit
    import pyarrow as pa
    said = list(named.values())
    chats,trimmed = trim_joined(tok, said)
    encoded = encode_fitting(tok, chats, max_length, list(named))
    def shorter(c, n): return drop_exchanges(c, n) if n else c
    def lost_space(a, b, n): return shorter(a, n)!=shorter(b, n) # in an exchange that is kept
    rows = [r for r in encoded if r]
    lost = [t and lost_space(a, b, r[2]) for t,a,b,r in zip(trimmed, said, chats, encoded) if r]
    more = dict(lost=pa.array([n for _,_,n in rows], pa.int32()), trimmed=pa.array(lost, pa.bool_()))
    return pa.table(_token_columns(rows) | more)

def _count_tokens(
    ds, # Dataset with `labels`
)->dict: # Tokens, supervised ones and their share; the median, 95th percentile and largest of a conversation's tokens
    import numpy as np, pyarrow.compute as pc
    labels = ds.with_format('arrow')[:]['labels']
    n = pc.list_value_length(labels).to_numpy()
    tokens,supervised = int(n.sum()),pc.sum(pc.not_equal(pc.list_flatten(labels), -100)).as_py()
    p50,p95,longest = np.percentile(n, [50,95,100]).astype(int).tolist()
    return dict(tokens=tokens, supervised=supervised, supervised_share=round(supervised/tokens,3),
        p50=p50, p95=p95, max=longest)

def _check_kept(
    n:int, # Conversations of a dataset with something to learn
    kept:int, # Those that fit
    max_length:int, # Tokens a conversation may have
    max_dropped:float, # Share that may be lost
    name:str, # How an error names the dataset
):
    if not n: raise UserError(name, "every answer has weight 0", "give weight 1 to what is to be learnt")
    if kept and (n-kept)/n<=max_dropped: return
    raise UserError(name, f"{n-kept} of {n} conversations have no exchange that fits max_length={max_length}",
        "raise MAX_LENGTH or shorten them")

_BATCH = 1000 # conversations of a batch

def _encode_rows(ds, first, tok, max_length, name):
    "How many conversations of the batch that begins at `first` are only read, and the others from `_encode_batch`."
    rows = enumerate(ds['messages'][first:first+_BATCH], first)
    chats = {(n := f'{name} row {i}'): check_messages(m, n) for i,m in rows}
    taught = {n:c for n,c in chats.items() if any(map(is_learnt, c))}
    return len(chats)-len(taught),_encode_batch(tok, taught, max_length)

def _encode_columns(
    ds, # With `messages`
    tok, # Tokenizer from `load_tokenizer`
    max_length:int, # Tokens a conversation may have
    name:str, # How an error names the dataset
)->tuple: # Dataset of the columns of `_encode_batch`; how many conversations are only read, as every answer has weight 0
    from concurrent.futures import ThreadPoolExecutor
    from datasets import Features, List, Value
    from datasets.fingerprint import Hasher
    only,jobs,pool = 0,{},ThreadPoolExecutor(2 if chat_format(tok)==OWN else 1)
    def enc(_, idxs):
        nonlocal only
        for i in range(idxs[0], min(idxs[0]+2*_BATCH, len(ds)), _BATCH):
            if i not in jobs: jobs[i] = pool.submit(_encode_rows, ds, i, tok, max_length, name)
        n,table = jobs.pop(idxs[0]).result()
        only += n
        return table
    ints = List(Value('int32'))
    columns = dict(input_ids=ints, labels=ints, lost=Value('int32'), trimmed=Value('bool'))
    gc.disable() # a collection would look at all that the libraries have made, and find nothing
    try: out = ds.map(enc, with_indices=True, batched=True, batch_size=_BATCH, remove_columns=ds.column_names,
        load_from_cache_file=False, desc='Tokenising', features=Features(columns),
        new_fingerprint=Hasher.hash((ds._fingerprint, tok.name_or_path, max_length)))
    finally:
        gc.enable() # first, since who is in a hurry interrupts the wait, too
        pool.shutdown(cancel_futures=True)
    return out,only

def encode_dataset(
    ds, # `datasets.Dataset` with a `messages` column
    tok, # Tokenizer from `load_tokenizer`
    max_length:int=2048, # Tokens a conversation may have
    max_dropped:float=0.05, # Share of conversations that may be lost before the run is refused
    name:str='dataset', # How an error names it
    held_out:bool=False, # Is it only measured? Then no loss is too much
)->tuple: # Dataset of `input_ids` and `labels` (-100 where the loss doesn't look), and a report
    "Encode every conversation of a dataset and say what became of it."
    if 'messages' not in ds.column_names:
        raise UserError(name, f"no `messages` column, got {ds.column_names}", "each row needs a list of turns")
    out,only = _encode_columns(ds, tok, max_length, name)
    dropped = len(ds)-only-len(out)
    if held_out and not len(out): return out,dict(conversations=len(ds), kept=0, dropped=dropped)
    if not held_out: _check_kept(len(ds)-only, len(out), max_length, max_dropped, name)
    kept = dict(conversations=len(ds), kept=len(out), shortened=sum(k>0 for k in out['lost'][:]), dropped=dropped)
    if only: kept['weight_0'] = only
    if trimmed := sum(out['trimmed'][:]):
        kept['trimmed'] = trimmed
        log.warning(f"{name}: {trimmed} of {len(out)} conversations lost white space before answers, "
            "which the tokenizer joins with the template's")
    return out.remove_columns(['lost','trimmed']),kept | _count_tokens(out)

# ------------------------------------------------------------------------------
# model_qlora: Base model, NF4, LoRA, memory plan, audit
# ------------------------------------------------------------------------------

SUCCESSOR = "mistralai/Ministral-3-3B-Instruct-2512-BF16" # Apache-2.0; plain -2512 is FP8, which NF4 can't load

WEIGHTS = ('model.safetensors','model.safetensors.index.json') # transformers loads one of them, or opens a pickle

def _named_shards(
    index:dict, # model.safetensors.index.json
    names:set, # Files that are there
    what:str, # How an error names the model
)->list: # Files that the index names, sorted
    where = index.get('weight_map')
    if not isinstance(where, dict) or not all(isinstance(n, str) for n in where.values()):
        raise UserError(what, f"its {WEIGHTS[1]} has no weight_map", "fetch the base again")
    shards = sorted(set(where.values()))
    for n in shards:
        if n not in names or '/' in n or not n.endswith('.safetensors'):
            raise UserError(what, f"it lacks {excerpt(n, 80)}, which its index names", "fetch the base again")
    if not shards: raise UserError(what, "it lacks the shards, which its index names", "fetch the base again")
    return shards

def weight_files(
    names:set, # Files of a folder or repo
    read, # Name of the index → its text
    what:str="base model", # What to call it in an error
)->list: # Safetensors files
    "The files that hold a base's weights, or a refusal where they are not all there."
    one,index = WEIGHTS
    if one in names: return [one]
    if index in names: return _named_shards(read_json(read(index), what=f"{what}: its {index}"), names, what)
    if 'adapter_config.json' in names: raise UserError(what, "it is an adapter", "name the base that it was trained on")
    pickles = sorted(n for n in names if n.endswith(('.bin','.pt','.pth')))
    if pickles:
        raise UserError(what, f"it has its weights as a pickle ({excerpt(pickles[0], 60)}), which is never opened",
            "name a copy in safetensors, such as transformers' save_pretrained writes")
    raise UserError(what, f"it has no {one} and no {index}", "name a base in the format that transformers saves")

MOST_LAYERS = 1024 # or experts; the largest public models have 126 and 512

MOST_LABELS = 1_000_000

_counted = re.compile(r'(layers?|depth|experts|blocks)$')

def _config_limit(
    key:str, # In a config.json
)->float: # Largest number that it may have
    if _counted.search(key): return MOST_LAYERS
    return MOST_LABELS if key=='num_labels' else math.inf

def check_model_config(
    cfg:dict, # A model's config.json
    what:str, # What it belongs to, such as "base model org/name"
)->dict: # The same
    "Refuse a config that asks for more layers than any model has."
    for part in [cfg, *(c for c in cfg.values() if isinstance(c, dict))]:
        for k,v in part.items():
            if isinstance(v, (int,float)) and v>_config_limit(k):
                raise UserError(what, f"its config.json says {excerpt(k, 60)}={v:g}, more than any model has",
                    "choose another")
        for k in ('quantization_config','compression_config'):
            if not isinstance(part.get(k) or {}, dict):
                raise UserError(what, f"its config.json has a {k} that says nothing", "choose another")
    if cfg.get('auto_map'): warn_custom_code(what)
    return cfg

def _model_info(
    repo:str, # Hub id
): # `ModelInfo`, or None where there is no such repo
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
    with asking_hub(f"base model {repo}"):
        try: return HfApi().model_info(repo)
        except HFValidationError:
            raise UserError(f"base model {repo!r}", "no such folder here, and no name that a Hub repo may have",
                "check BASE_MODEL") from None
        except RepositoryNotFoundError as e:
            if isinstance(e, GatedRepoError): raise

def _model_config(
    path:str, # Hub id or local folder
    revision:str=None, # Commit of the Hub repo
)->dict: # Its config.json, checked
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError
    what,file = f"base model {str(path)!r}",Path(path)/'config.json'
    if not Path(path).is_dir():
        with asking_hub(what):
            try: file = Path(hf_hub_download(path, 'config.json', revision=revision))
            except RemoteEntryNotFoundError:
                raise UserError(what, "it has no config.json", "choose a causal language model") from None
    return check_model_config(read_json(file, what=f"{what}: its config.json"), what)

def _marked_fp8(cfg): return (cfg.get('quantization_config') or {}).get('quant_method')=='fp8'

def _holds_fp8(folder): # By the headers of its weights
    headers = (read_header(f)[0] for f in Path(folder).glob('*.safetensors'))
    return any(t['dtype'].startswith('F8') for h in headers for t in h.values())

def check_weights(
    name:str, # Hub id or local folder
    cfg:dict, # Its config
    files:list, # Names of the files that it has
    source:str=None, # Repo that it was made from, where its card says so
):
    "Refuse weights that can't be trained on and merged, before they are downloaded."
    q = cfg.get('quantization_config') or cfg.get('compression_config') or {}
    if q and not _marked_fp8(cfg):
        method = excerpt(q.get('quant_method') or 'a method without a name', 40)
        raise UserError(f"base model {name!r}",
            f"its weights are quantised already ({method}), and NF4 is made from full-precision ones",
            f"set BASE_MODEL to {excerpt(source or 'the repo that it was made from', 100)}")
    if set(WEIGHTS)&set(files): return
    kinds = ('.bin','.pt','.pth','.gguf','.msgpack','.h5','.safetensors')
    found = ', '.join(excerpt(f, 60) for f in sorted(f for f in files if f.endswith(kinds))[:3])
    raise UserError(f"base model {name!r}",
        f"it has no {WEIGHTS[0]} ({found or 'no weights'}), and other formats can't be trained and merged",
        "choose a repo with safetensors, or convert it (save_pretrained writes them)")

def _stand_in(
    base_model:str, # Hub id or local folder
)->tuple: # Name of what is loaded in its place, and why; itself and None where it is loaded
    if Path(base_model).is_dir(): fp8 = _marked_fp8(_model_config(base_model)) and _holds_fp8(base_model)
    elif info := _model_info(base_model): fp8 = _marked_fp8(_model_config(base_model, info.sha))
    elif base_model!=SEED_BASE:
        raise UserError(f"base model {base_model!r}",
            "no such folder here, and the Hub has no such repo or HF_TOKEN may not see it", "check BASE_MODEL")
    else: return SUCCESSOR,f"{SEED_BASE} was never published; its open successor is"
    if not fp8: return base_model,None
    return f"{base_model}-BF16",f"{base_model} holds FP8 weights, which NF4 can't load; its BF16 sibling is"

def resolve_base(
    base_model:str=SEED_BASE, # Hub id or local folder
    strict:bool=False, # Refuse a substitute
)->dict: # `requested`, `id`, `revision` (commit; None: a folder), `note` (why another; or None), `auto` (transformers' class)
    "Find the base model that stands for the name asked for."
    name,why = _stand_in(base_model)
    if why and strict:
        raise UserError(f"base model {base_model!r}", f"{why} {name}, and BASE_MODEL_STRICT=1 refuses another model",
            f"set BASE_MODEL={name}")
    note = why and f"{why} taken"
    info = None
    if not Path(name).is_dir():
        if Path(base_model).is_dir() or not (info := _model_info(name)):
            raise UserError(f"base model {base_model!r}", f"{note}, but there is no {name}", "set BASE_MODEL")
    if note: log.warning(f"BASE MODEL: {note}: {name}")
    rev = info.sha if info else None
    cfg,card = _model_config(name, rev),getattr(info, 'card_data', None) or {}
    check_weights(name, cfg, [s.rfilename for s in info.siblings] if info else os.listdir(name), card.get('base_model'))
    auto = 'AutoModelForImageTextToText' if 'vision_config' in cfg else 'AutoModelForCausalLM'
    return dict(requested=base_model, id=name, revision=rev, note=note, auto=auto)

def check_private(
    api, # `HfApi`
    repo:str, # `owner/name`, of a repo that is there
    repo_type:str='model', # Or `dataset`
): # `ModelInfo` or `DatasetInfo`
    "Refuse a repo that anyone may read."
    from huggingface_hub import constants
    info = api.repo_info(repo, repo_type=repo_type)
    if info.private: return info
    page = f"{constants.ENDPOINT}/{'datasets/'*(repo_type=='dataset')}{repo}/settings"
    raise UserError(f"{repo_type} repo {repo}", "it is public, and nothing is written to a public repo",
        f"make it private ({page}), or name another one")

def private_repo(
    api, # `HfApi`
    repo:str, # `owner/name`
    repo_type:str='model', # Or `dataset`
): # `ModelInfo` or `DatasetInfo`
    "Make a repo where it is missing, private; gate it; refuse one that is public."
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
    try: info = check_private(api, repo, repo_type)
    except RepositoryNotFoundError:
        api.create_repo(repo, repo_type=repo_type, private=True, exist_ok=True)
        info = check_private(api, repo, repo_type) # what an organisation has set may win
    if info.gated=='manual': return info
    try: api.update_repo_settings(repo, repo_type=repo_type, gated='manual')
    except HfHubHTTPError as e:
        if e.response.status_code!=403: raise
        log.warning(f"{repo_type} repo {repo} is private, but can't be gated with this token: "
            "whoever is given access sees it at once")
    return info

def _model_class(config): # transformers' class for the language model
    from transformers import AutoModelForCausalLM
    try: return AutoModelForCausalLM._model_mapping[type(config.get_text_config())]
    except KeyError:
        raise UserError(f"model type {config.model_type!r}", "transformers has no causal language model of it",
            "choose one that has") from None

_BARE = {} # the model last made, by its config, and only read: a plan asks for the same one for each kind of machine

def _bare_model(config): # A language model on the meta device, which has shapes and no storage
    import torch
    from transformers import AutoModelForCausalLM
    text,name = config.get_text_config(),getattr(config, '_name_or_path', '') or config.model_type
    key = type(text),text.to_json_string()
    if key in _BARE: return _BARE[key]
    with reading(f"base model {name}: its config.json", 'choose a causal language model'), torch.device('meta'):
        model = AutoModelForCausalLM.from_config(text, trust_remote_code=False)
    _BARE.clear()
    _BARE[key] = model
    return model

STATEFUL = {'linear_attention','conv','hybrid','hybrid_sliding'} # transformers' names for layers that keep a state

def check_layers(
    config, # Of a model, from `AutoConfig`
    name:str='base model', # How an error names the model
):
    "Refuse a model whose layers don't keep packed conversations apart."
    c = config.get_text_config()
    types = set(getattr(c, 'layer_types', None) or [])
    if 'sliding_attention' in types and not c.sliding_window:
        raise UserError(name, "its config.json gives layers a window (sliding_attention) and no sliding_window", "fetch it again")
    kinds = STATEFUL & types
    if not kinds and not _model_class(config)._is_stateful: return
    which = ', '.join(sorted(kinds)) or 'recurrent'
    raise UserError(name, f"its layers ({which}) carry a state from one conversation of a packed sequence into the next",
        "choose a model whose layers are all attention")

def language_layers(
    model, # Causal language model, with or without an adapter
)->dict: # Name within the decoder → linear layer
    "The linear layers of a language model, without its head."
    import torch
    head = model.get_output_embeddings()
    def is_plain(l): return type(l) is torch.nn.Linear or type(l).__module__.startswith('bitsandbytes') # no router
    def is_own(n, l): return isinstance(l, torch.nn.Linear) and is_plain(l) and l is not head and '.lora_' not in n
    return {n:l for n,l in model.get_decoder().named_modules() if is_own(n, l)}

def decoder_layers(
    model, # Causal language model
): # `nn.ModuleList`
    "The layers of its decoder, whatever they are called."
    import torch
    return next(m for m in model.get_decoder().modules() if isinstance(m, torch.nn.ModuleList))

def base_config(
    base:dict, # As `resolve_base` gives it
): # transformers' config
    "A base model's config, or a line on why it can't be trained."
    from transformers import AutoConfig
    what = f"base model {base['id']!r}"
    with reading(f"{what}: its config.json", 'choose a causal language model', hub=not Path(base['id']).is_dir()):
        _model_config(base['id'], base['revision'])
        try: cfg = AutoConfig.from_pretrained(base['id'], revision=base['revision'], trust_remote_code=False)
        except (ValueError, KeyError):
            raise UserError(what, "its config.json names no architecture that transformers knows",
                "choose a causal language model") from None
        if _marked_fp8(cfg.to_dict()): del cfg.quantization_config
        check_layers(cfg, what)
        bare = _bare_model(cfg)
        if not language_layers(bare): # GPT-2's are Conv1D
            raise UserError(what, "its layers have no linear ones, which LoRA would adapt", "choose another base")
        if bare.get_decoder() is bare: # Llama 4's
            raise UserError(what, "transformers doesn't say which part of it is its decoder", "choose another base")
        if not all(getattr(m, 'is_causal', True) for m in bare.modules()): # as an encoder's, or that of a model for embeddings
            raise UserError(what, "its attention looks ahead, so it can't write", "choose a causal language model")
    return cfg

def check_size(
    folder:str, # Of a base model
    config, # Its config
):
    "Refuse a base whose config asks for more weights than its files hold."
    folder,what = Path(folder),f"base model {str(folder)!r}"
    shards = weight_files({p.name for p in folder.iterdir()}, lambda n: (folder/n).read_bytes(), what)
    there = sum(math.prod(t['shape']) for n in shards for t in read_header(folder/n)[0].values())
    asked = sum(p.numel() for p in _bare_model(config).parameters())
    if asked>2*there: # a head may be tied
        raise UserError(what, f"its config.json asks for {asked:,} weights, and its files hold {there:,}",
            "fetch it again, or choose another")

def say_unquantised(
    config, # Of the base model
)->float: # Share of its layers' weights that can be in 4 bits
    "Say how much of a model stays in bf16."
    m = _bare_model(config)
    linear = sum(l.weight.numel() for l in language_layers(m).values())
    whole = sum(p.numel() for p in decoder_layers(m).parameters())
    if linear<.9*whole:
        log.warning(f"NF4: {1-linear/whole:.0%} of the layers' weights ({2*(whole-linear)/2**30:.1f} GiB) "
            "are no linear layers, such as experts: they stay in bf16, and aren't adapted")
    return linear/whole

def _check_weights(
    model, # From `from_pretrained`
    found:dict, # Its `output_loading_info`
    what:str, # How an error names the model
):
    "Refuse a model whose layers aren't those of its files."
    where = next(n for n,m in model.named_modules() if m is decoder_layers(model))
    dropped = [k for k in found['unexpected_keys'] if k.startswith(f'{where}.') and not k.endswith('inv_freq')]
    packed = {n:l for n,l in language_layers(model).items() if hasattr(l.weight, 'quant_state')}
    shapes = [n for n,l in packed.items() if tuple(l.weight.quant_state.shape)!=(l.out_features, l.in_features)]
    kinds = {"its files lack {}, which its config.json asks for": found['missing_keys'],
        "its files hold {}, for which its config.json has no place": dropped,
        "{} has another shape in its files than its config.json says": shapes}
    for said,names in kinds.items():
        if names: raise UserError(what, said.format(min(names))+f" ({len(names)} in all)"*(len(names)>1), "fetch it again, or choose another")

def _blind(cls): # The same model class, built without a vision tower
    def __init__(self, config):
        cls.__init__(self, config)
        self.model.vision_tower = self.model.multi_modal_projector = None
    return type(cls.__name__, (cls,), dict(__init__=__init__, __module__=cls.__module__))

def _loaded_class(base, cfg): # transformers', without a picture encoder
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    if base['auto']=='AutoModelForCausalLM': return AutoModelForCausalLM
    return _blind(AutoModelForImageTextToText._model_mapping[type(cfg)])

def _nf4(
    shard:bool, # Will ranks share it? FSDP wants its 4 bits stored in the dtype of the rest
    dtype, # torch's, to compute in
): # `BitsAndBytesConfig`
    import torch
    from transformers import BitsAndBytesConfig
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_storage=dtype if shard else torch.uint8)

def _load_device(cfg, load_in_4bit, shard): # the CPU where there is no GPU, or where the base doesn't fit on it before it is shared
    import torch
    if not torch.cuda.is_available(): return 'cpu'
    if shard:
        need = memory_plan(cfg, load_in_4bit=load_in_4bit, lora_target_modules=('all-linear',))['load']
        if need*2**30 > .9*torch.cuda.mem_get_info()[0]: return 'cpu'
    return torch.cuda.current_device()

def load_model(
    base:dict, # As `resolve_base` gives it
    load_in_4bit:bool=True, # NF4 with double quantisation
    attn_implementation:str='sdpa', # Name in transformers' `AttentionInterface`
    shard:bool=False, # Will ranks share it? (its 4 bits are then stored in the dtype of the rest)
    dtype:str='', # To compute in; what `base_dtype` gives where empty
): # Model on the GPU; on the CPU where there is none, or where it is to be shared and doesn't fit before
    "Load a base model for training."
    import torch
    cfg,kind = base_config(base),getattr(torch, dtype or base_dtype())
    if load_in_4bit: say_unquantised(cfg)
    if not dtype and kind==torch.float32: log.info("this CPU is slow in bfloat16: the base is computed in float32")
    if here := Path(base['id']).is_dir(): check_size(base['id'], cfg)
    with reading(f"base model {base['id']!r}", hub=not here):
        model,found = _loaded_class(base, cfg).from_pretrained(base['id'], revision=base['revision'], config=cfg, dtype=kind,
            attn_implementation=attn_implementation, use_safetensors=True, trust_remote_code=False,
            quantization_config=_nf4(shard, kind) if load_in_4bit else None, output_loading_info=True,
            device_map={'': _load_device(cfg, load_in_4bit, shard)})
    _check_weights(model, found, f"base model {base['id']!r}")
    text = model.config.get_text_config()
    text.use_cache = False
    if getattr(text, 'router_aux_loss_coef', 0): text.router_aux_loss_coef = 0. # else TRL asks for router logits
    return model

def lora_targets(
    text:str, # Names of linear layers, by comma, or `all-linear`
)->tuple: # The same names sorted, each once; `('all-linear',)` stands for all
    "Read which layers are to be adapted: however they are written, the same layers give the same run."
    names = sorted({n.strip() for n in text.split(',')}-{''})
    if not names or not all(n=='all-linear' or n.isidentifier() for n in names):
        raise UserError("LORA_TARGET_MODULES", f"must name linear layers, got {text!r}",
            f"name some of {','.join(LORA_TARGETS)}, or all-linear")
    return ('all-linear',) if 'all-linear' in names else tuple(names)

_QKV = {'q_proj','k_proj','v_proj'}

JOINED = dict(qkv_proj=_QKV, query_key_value=_QKV, gate_up_proj={'gate_proj','up_proj'}) # one layer that stands for several

def resolve_targets(
    model, # Without an adapter; on the meta device, too
    targets:tuple, # From `lora_targets`
)->tuple: # Last parts of the names of linear layers, sorted
    "The layers that a model has of those to be adapted."
    layers = language_layers(model)
    linear = {n.split('.')[-1] for n in layers}
    others = {n.split('.')[-1] for n,_ in model.get_decoder().named_modules() if n not in layers}
    names = linear-others # a name that is also something else's isn't taken
    targets = set(targets)
    for joined,parts in JOINED.items():
        if joined in names and parts<=targets-names: targets = targets-parts | {joined}
    if missing := targets-names-{'all-linear'}:
        raise UserError("lora_target_modules",
            f"{model.config._name_or_path or model.config.model_type} has no linear layer {', '.join(sorted(missing))}",
            f"choose from {', '.join(sorted(names)) or 'none'}, or all-linear")
    return tuple(sorted(names if 'all-linear' in targets else targets))

def _check_adapted(model, asked): # PEFT takes the names of linear layers for those of a mixture's experts
    from peft.tuners.lora import LoraLayer
    others = {n for n,m in model.get_decoder().named_modules() if isinstance(m, LoraLayer)} - asked
    if others:
        raise UserError("lora_target_modules", f"PEFT would adapt {min(others)} as well, which stays as it is here",
            "leave down_proj, gate_proj and up_proj out")

def add_lora(
    model, # From `load_model`
    lora_r:int=16, # Rank
    lora_alpha:int=32, # The update is scaled by lora_alpha/lora_r
    lora_dropout:float=0.0, # Share of the adapter's inputs set to zero in training
    lora_target_modules:tuple=LORA_TARGETS, # Linear layers to adapt, from `lora_targets`
    seed:int=0, # Of lora_A's random start
    revision:str=None, # The base's commit, for `adapter_config.json`; None for a folder
): # `PeftModel` whose adapter is fp32 and changes nothing yet
    "Put a fresh adapter on the language model."
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed
    names = resolve_targets(model, lora_target_modules)
    asked = {n for n in language_layers(model) if n.split('.')[-1] in names}
    stem = r'.*\.language_model\..*' if any('.language_model.' in n for n,_ in model.named_modules()) else '.*'
    set_seed(seed)
    targets = rf"{stem}\.({'|'.join(map(re.escape, names))})"
    lora = LoraConfig(r=lora_r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, bias='none', task_type='CAUSAL_LM',
        target_modules=targets)
    adapted = get_peft_model(model, lora, revision=revision)
    _check_adapted(model, asked)
    return adapted

class LayerKind(NamedTuple):
    "What `fast` is told of a kind of decoder layer."
    norms:tuple=('input_layernorm', None, 'post_attention_layernorm', None) # Before and after attention and the MLP
    joined:bool=False # Queries, keys and values are one projection, gate and up another
    plus_one:bool=False # Norms multiply by one more than their weights
    capped:bool=False # Attention caps its scores
    one_window:bool=False # Every layer has the config's window; else each says its own
    by_type:bool=False # How positions are turned depends on the layer's type

_AFTER = None,'post_attention_layernorm',None,'post_feedforward_layernorm'

_AROUND = 'input_layernorm','post_attention_layernorm','pre_feedforward_layernorm','post_feedforward_layernorm'

_KINDS = dict.fromkeys(('Llama','Qwen2','Qwen3','SmolLM3','Granite','Ministral'), LayerKind())

_KINDS |= dict.fromkeys(('Mistral','Ministral3'), LayerKind(one_window=True))

_KINDS |= dict(Phi3=LayerKind(joined=True, one_window=True), Olmo2=LayerKind(_AFTER),
    Olmo3=LayerKind(_AFTER, by_type=True), Gemma=LayerKind(plus_one=True),
    Gemma2=LayerKind(_AROUND, plus_one=True, capped=True), Gemma3=LayerKind(_AROUND, plus_one=True, by_type=True))

FAST_LAYERS = {f'{k}DecoderLayer':v for k,v in _KINDS.items()}

def fast_projections(
    layer, # Decoder layer of a class in `FAST_LAYERS`
)->dict: # `qkv`, `o`, `gu`, `down`: names of the linear layers that read the same input, in the order of their outputs
    "A layer's projections, as `fast` puts them together."
    joined = FAST_LAYERS[type(layer).__name__].joined
    qkv,gu = ('qkv_proj',) if joined else ('q_proj','k_proj','v_proj'),('gate_up_proj',) if joined else ('gate_proj','up_proj')
    names = dict(qkv=('self_attn',qkv), o=('self_attn',('o_proj',)), gu=('mlp',gu), down=('mlp',('down_proj',)))
    return {k:[f'{part}.{n}' for n in ns] for k,(part,ns) in names.items()}

def gate_activation(
    layer, # As for `fast_projections`
)->str: # Name of a class, such as `SiLUActivation`
    "What a layer's gate goes through."
    mlp,joined = layer.mlp,FAST_LAYERS[type(layer).__name__].joined
    return type(mlp.activation_fn if joined else mlp.act_fn).__name__

_FLOATS = {'scaling','attention_dropout','residual_multiplier','attn_logit_softcapping'} # attributes that `fast` reads

def _strange_parts(layer): # What a layer of a known class has beside what `fast` computes
    import torch
    kind,own = FAST_LAYERS[type(layer).__name__],{n for ns in fast_projections(layer).values() for n in ns}
    norms = [n for n in (*kind.norms, 'self_attn.q_norm', 'self_attn.k_norm') if n]
    tensors = [n for n,_ in (*layer.named_parameters(), *layer.named_buffers())]
    yield from (n for n in tensors if not any(n.startswith(f'{o}.') for o in (*own, *norms)))
    modules = dict(layer.named_modules())
    yield from (f'{n} ({type(modules[n]).__name__})' for n in norms if n in modules and 'RMSNorm' not in type(modules[n]).__name__)
    yield from (f'{n} ({m.p:g})' for n,m in modules.items() if isinstance(m, torch.nn.Dropout) and m.p and '.lora_' not in n)
    for m in (layer, layer.self_attn, layer.mlp):
        yield from (f'{k}={v:g}' for k,v in vars(m).items() if isinstance(v, float) and v and k not in _FLOATS)

def _why_not_layer(layer):
    "Why `fast` can't compute a layer of a known class."
    at = layer.self_attn
    if strange := next(_strange_parts(layer), None): return f"it doesn't know {strange}"
    if (act := gate_activation(layer)) not in ('SiLUActivation','GELUTanh'): return f"its activation is {act}"
    if at.attention_dropout: return f"its attention drops out weights ({at.attention_dropout})"
    if not at.is_causal: return "its attention looks ahead"

def _turned(model)->set: # How many dimensions of a head are turned, in each of the ways that there are
    buffers = dict(model.get_decoder().rotary_emb.named_buffers())
    return {2*b.numel() for n,b in buffers.items() if n.endswith('inv_freq') and 'original' not in n}

def why_not_known(
    model, # Causal language model, with or without an adapter; on the meta device, too
)->str: # None where it can
    "Why `fast` can't compute a model's layers."
    layers = decoder_layers(model)
    kinds = {type(l).__name__ for l in layers}
    if not kinds<=set(FAST_LAYERS): return f"{', '.join(sorted(kinds))} is not known"
    if why := next(filter(None, map(_why_not_layer, layers)), None): return why
    d = layers[0].self_attn.head_dim
    if d&(d-1) or not 16<=d<=256: return f"its heads have {d} dimensions"
    if _turned(model)!={d}: return f"it turns {', '.join(map(str, sorted(_turned(model))))} of a head's {d} dimensions"

def _why_not_varlen(
    cls, # transformers' class
    c, # Its text config
)->str|None: # None where it can
    "Why a model can't use variable-length flash attention."
    if not (cls._supports_flash_attn and cls._supports_attention_backend):
        return f"{cls.__name__} knows no flash attention"
    drop = next((k for k,v in c.to_dict().items() if 'att' in k and 'drop' in k and v), None)
    if drop: return f"flash attention would leave out {drop}={getattr(c, drop)}"
    d = getattr(c, 'qk_head_dim', None) or getattr(c, 'head_dim', None) or c.hidden_size//c.num_attention_heads
    if (getattr(c, 'v_head_dim', None) or d)!=d:
        return f"its queries have {d} dimensions a head, its values {c.v_head_dim}"
    if d>256: return f"its heads have {d} dimensions, flash attention takes 256"

def choose_attention(
    config, # Of the base model, from `base_config`
)->tuple: # Name in transformers' `AttentionInterface`, and why
    "The attention kernel for packed sequences that this model and this machine can run."
    import torch
    cls,c = _model_class(config),config.get_text_config()
    if not cls._supports_sdpa:
        return 'eager',f"{cls.__name__} knows no other; it is slow, and needs much memory for long sequences"
    if not torch.cuda.is_available(): return 'sdpa',"there is no CUDA device"
    if torch.cuda.get_device_capability()<(8,0): return 'sdpa',f"{torch.cuda.get_device_name()} is older than Ampere"
    if why := _why_not_varlen(cls, c): return 'sdpa',why
    register_varlen()
    return 'varlen',"flash attention, conversation by conversation"

def register_varlen():
    "Register torch's variable-length flash attention with transformers, as `varlen`."
    import torch
    from torch.nn.attention.varlen import varlen_attn
    from transformers import AttentionInterface, AttentionMaskInterface
    gqa = dict(enable_gqa=True) if torch.__version__>=(2,12) else {} # 2.11 takes grouped heads without being told
    def varlen(module, query, key, value, attention_mask,
               scaling=None, sliding_window=None, cu_seq_lens_q=None, max_length_q=None, **kwargs):
        b,h,t,d = query.shape
        def flat(x): return x.transpose(1,2).reshape(b*t,-1,d).contiguous() # a slice would keep all it is cut from
        before = sliding_window-1 if sliding_window else -1 # tokens before a token; transformers counts it itself
        cu,longest = cu_seq_lens_q,max_length_q
        o = varlen_attn(flat(query), flat(key), flat(value), cu, cu, longest, longest,
            scale=scaling, window_size=(before, 0), **gqa)
        return o.view(b,t,h,d),None
    AttentionInterface.register('varlen', varlen)
    AttentionMaskInterface.register('varlen', lambda *args, **kwargs: None)

def _take_rng(
    devices, # CUDA devices whose state is taken too
)->dict: # States of the random number generators
    import random, numpy as np, torch
    return dict(python=random.getstate(), numpy=np.random.get_state(), torch=torch.get_rng_state(),
        cuda={d: torch.cuda.get_rng_state(d) for d in devices})

def _put_rng(
    states:dict, # From `_take_rng`
):
    import random, numpy as np, torch
    random.setstate(states['python'])
    np.random.set_state(states['numpy'])
    torch.set_rng_state(states['torch'])
    for d,s in states['cuda'].items(): torch.cuda.set_rng_state(s, d)

def _packable(model): # Layers that bitsandbytes repacks when they first run in eval mode, on a CPU with AVX512-BF16
    able = [m for m in model.modules() if getattr(m, 'support_avx512bf16_for_cpu', False)]
    return [m for m in able if m.weight.device.type=='cpu']

def _take_packed(model): # What repacking would change: a weight's data, its quantisation state and that state's fields
    weights = [m.weight for m in _packable(model)]
    return [(w, w.data, w.quant_state, copy.copy(vars(w.quant_state))) for w in weights]

def _put_packed(packed): # From `_take_packed`
    for w,data,quant_state,fields in packed:
        w.data = data
        vars(quant_state).clear(); vars(quant_state).update(fields)

@contextmanager
def preserve_training_state(
    model, # Model that may be in training
    tok=None, # Its tokenizer; None where nothing is padded
):
    "Evaluation mode, cache, left padding and no gradients inside; all of it, and every random state, put back after."
    import torch
    cfg = model.config.get_text_config() # a multimodal config has no cache of its own
    modes,attn = [(m,m.training) for m in model.modules()],cfg._attn_implementation
    use_cache,side = cfg.use_cache,tok and tok.padding_side
    rng = _take_rng({p.device for p in model.parameters() if p.device.type=='cuda'})
    packed = _take_packed(model)
    try:
        model.eval()
        cfg.use_cache = True
        if tok: tok.padding_side = 'left'
        if attn=='varlen': cfg._attn_implementation = 'sdpa' # it knows neither caches nor padding
        # compiled layers were made for training's shapes
        with torch.inference_mode(), torch.compiler.set_stance('force_eager'): yield
    finally:
        _put_packed(packed)
        for m,t in modes: m.training = t
        cfg.use_cache,cfg._attn_implementation = use_cache,attn
        if tok: tok.padding_side = side
        _put_rng(rng)

def sanity_line(
    model, # Any causal language model
    tok, # From `load_tokenizer`
)->tuple: # What it replies, greedily, and the perplexity of the right answer
    "Ask for the capital of France."
    import torch
    from torch.nn.functional import cross_entropy
    q = dict(role='user', content='What is the capital of France?')
    a = dict(role='assistant', content='The capital of France is Paris.')
    ids,mask = (torch.tensor([x], device=model.device) for x in encode_chats(tok, [[q,a]])[0])
    p = torch.tensor([encode_prompt(tok, [q])], device=model.device)
    with preserve_training_state(model, tok):
        out = model.generate(input_ids=p, attention_mask=torch.ones_like(p), max_new_tokens=12, do_sample=False,
            pad_token_id=tok.pad_token_id)
        loss = cross_entropy(model(input_ids=ids).logits[0,:-1].float(), ids[0,1:], reduction='none')
        nll = loss[mask[0,1:]==1].mean()
    return tok.decode(out[0, p.shape[1]:], skip_special_tokens=True),nll.exp().item()

def _dtype(t): return str(t.dtype).removeprefix('torch.')

def _four_bit_layers(model): # Those of bitsandbytes: PEFT has a class of that name too
    named = [m for m in model.modules() if type(m).__name__=='Linear4bit']
    return [m for m in named if type(m).__module__.startswith('bitsandbytes')]

def _layer_rows(
    model, # From `add_lora`
    linear:list, # Last parts of the names of its linear layers
    targets:tuple, # Those to be adapted
    load_in_4bit:bool, # Was NF4 asked for?
)->list: # `(what, asked, actual)` of its layers and its adapter
    four = _four_bit_layers(model)
    states = {(m.weight.quant_type, m.weight.quant_state.nested, m.compute_dtype) for m in four}
    kinds = sorted(f"{kind}{' double' if nested else ''} {str(dtype)[6:]}" for kind,nested,dtype in states)
    trained = {n:p for n,p in model.named_parameters() if p.requires_grad}
    adapted = [n for n,_ in model.named_modules() if n.split('.')[-1]=='base_layer']
    return [
        ('adapted layers', sum(n in targets for n in linear), len(adapted)),
        ('4-bit layers', len(linear) if load_in_4bit else 0, len(four)),
        ('quantisation', [f'nf4 double {base_dtype()}'] if load_in_4bit else [], kinds),
        ('trained', ['lora_A','lora_B'], sorted({n.split('.')[-3] for n in trained})),
        ("adapter's dtype", ['float32'], sorted({_dtype(p) for p in trained.values()}))]

def _model_rows(
    model, # From `add_lora`
    tok, # From `load_tokenizer`
    attn_implementation:str, # Attention kernel asked for
)->list: # `(what, asked, actual)` of the model and its tokenizer
    emb,head = model.get_input_embeddings().weight,model.get_output_embeddings().weight
    text = model.config.get_text_config()
    tower = any('vision_tower' in n for n,_ in model.named_parameters())
    return [
        ('head tied', bool(text.tie_word_embeddings), emb.data_ptr()==head.data_ptr()),
        ("embedding's dtype", base_dtype(), _dtype(emb)),
        ('attention', attn_implementation, text._attn_implementation),
        ('pad is not EOS', True, tok.pad_token_id!=tok.eos_token_id),
        ('vocabulary fits', True, vocabulary_size(tok)<=emb.shape[0]),
        ('vision tower', 'none', 'loaded' if tower else 'none')]

def _model_facts(
    model, # From `add_lora`
    tok, # From `load_tokenizer`
    targets:tuple, # Layers that are adapted
)->dict: # What nothing was asked of: {what: actual}
    text,base = model.config.get_text_config(),model.get_base_model()
    trained = {n:p.numel() for n,p in model.named_parameters() if p.requires_grad}
    by = {t:sum(size for n,size in trained.items() if f'.{t}.' in n) for t in targets}
    layers = f"{text.num_hidden_layers} layers of {text.hidden_size}"
    return {'base model': f"{type(base).__name__}, {layers}, vocabulary {text.vocab_size:,}",
        'trained parameters': f"{sum(by.values()):,}: " + ', '.join(f'{k} {v:,}' for k,v in by.items()),
        'tokenizer': f"{type(tok).__name__}, {chat_format(tok)}, EOS {tok.eos_token_id}, pad {tok.pad_token_id}"}

def audit(
    model, # From `add_lora`
    tok, # From `load_tokenizer`
    load_in_4bit:bool=True, # Was NF4 asked for?
    attn_implementation:str='sdpa', # Attention kernel asked for
    lora_target_modules:tuple=LORA_TARGETS, # Layers asked for, from `lora_targets`
    ask:bool=True, # Ask it something
)->list: # Dicts of `what`, `asked`, `actual`, `ok`
    "Compare what was asked for with what is there."
    bare = _bare_model(model.config)
    targets = resolve_targets(bare, lora_target_modules)
    linear = [n.split('.')[-1] for n in language_layers(bare)]
    rows = _layer_rows(model, linear, targets, load_in_4bit) + _model_rows(model, tok, attn_implementation)
    facts = _model_facts(model, tok, targets)
    if ask:
        said,perplexity = sanity_line(model, tok)
        facts['it says'] = f'{said!r}; perplexity of the right answer {perplexity:,.1f}'
        rows.append(('computes numbers', True, math.isfinite(perplexity)))
    checked = [dict(what=w, asked=a, actual=b, ok=a==b) for w,a,b in rows]
    return checked + [dict(what=w, asked='', actual=b, ok='') for w,b in facts.items()]

def check_audit(
    rows:list, # From `audit`
):
    "Refuse to train on anything but what was asked for."
    bad = [f"{r['what']} should be {r['asked']}, is {r['actual']}" for r in rows if r['ok'] is False]
    if bad: raise UserError("audit", '; '.join(bad), "the model isn't what was asked for")

_BLOCK,_SUPERBLOCK = 64,256 # weights that share a scale in NF4; scales that share a scale of their own

def _load_bytes(
    n_4bit:int, # Weights in 4 bits
    n_bf16:int, # All others
    n_layers:int, # Of the decoder
    fast:bool, # Are the scales kept unpacked as well?
    shards:int=1, # Ranks that share the layers
)->float: # Bytes of a GPU
    own = 1/2/shards
    whole = 1/n_layers if shards>1 else 0 # two layers are together at a time
    scales = 1/_BLOCK + 4/_BLOCK/_SUPERBLOCK + 4/_BLOCK*fast
    return n_4bit*(own+whole) + n_4bit*scales + 2*n_bf16

def _adapter_bytes(
    n:int, # Parameters
    optim:str, # Name in transformers
    shards:int=1, # Ranks that share them
)->float: # Bytes of a GPU
    weight,gradient,bf16_copy = 4,4,2
    moments = 2 if '8bit' in optim else 8
    return n*(weight+gradient+bf16_copy+moments)/shards

HEAD_LOGITS = 2**27 # the head takes so many at a time

_MLP_SIZES = 'intermediate_size','ffn_hidden_size','ffn_dim','n_inner'

def _most(c, name): # of a text config, over its layers where these differ, as Gemma 4's and Gemma 3n's do
    values = [getattr(l, name, None) or 0 for l in getattr(c, 'per_layer_config', None) or [c]]
    return max(max(v) if isinstance(v, (list,tuple)) else v for v in values)

def _mlp_size(c): # of a text config; what names none makes it four times as wide as the model
    return max(_most(c, n) for n in _MLP_SIZES) or 4*c.hidden_size

def _kept_bytes(
    config, # Of the base model
    length:int, # Tokens of a packed sequence
    lora_r:int, # Rank of the adapter
    n_adapted:int, # Linear layers that it adapts
)->dict: # `eager`, `compiled`, `fast`: bytes that autograd keeps of a token in a layer
    c = config.get_text_config()
    hidden,heads,mlp = c.hidden_size,_most(c, 'num_attention_heads'),_mlp_size(c)
    head_dim = _most(c, 'head_dim') or hidden//heads
    attention = 4*(heads+(_most(c, 'num_key_value_heads') or heads))*head_dim + 4*heads
    scores = 0 if _model_class(config)._supports_sdpa else 8*heads*length
    more = dict(eager=scores, compiled=scores, fast=0)
    norms = dict(eager=12*hidden, compiled=4*hidden, fast=4*hidden+8)
    gated = dict(eager=8*mlp, compiled=4*mlp, fast=4*mlp)
    one_each = 2*lora_r*n_adapted/c.num_hidden_layers
    lora = dict(eager=one_each, compiled=one_each, fast=18*lora_r)
    return {k:norms[k]+attention+gated[k]+lora[k]+more[k] for k in norms}

def _more_norms(
    layer, # Decoder layer that `fast` knows
)->int: # Bytes that it keeps of a token for norms that Llama's layers lack
    kind,at = FAST_LAYERS[type(layer).__name__],layer.self_attn
    heads = at.config.num_attention_heads+at.config.num_key_value_heads if hasattr(at, 'q_norm') else 0
    after = len([n for n in kind.norms[1::2] if n])
    return heads*(2*at.head_dim+4) + after*(2*at.config.hidden_size+4)

def _activation_bytes(
    config, # Of the base model
    kept:dict, # From `_kept_bytes`
    way:str, # `eager`, `compiled` or `fast`
    gradient_checkpointing:bool, # Recompute whole layers
)->float: # Bytes that autograd keeps of a token in all layers
    c = config.get_text_config()
    if not gradient_checkpointing: return kept[way]*c.num_hidden_layers
    mlp_gradients = 2*_mlp_size(c) + 4*c.hidden_size
    again = kept['fast']+mlp_gradients if way=='fast' else kept['eager']
    return again + 2*c.hidden_size*c.num_hidden_layers

def _head_bytes(
    config, # Of the base model
    tokens:int, # Of a micro-batch
    supervised:float, # Share of them that the loss looks at
    fast:bool, # Are the layers `fast`'s? Theirs need less than the head
)->float: # Most bytes at the turn from forward to backward
    c,looked_at = config.get_text_config(),supervised*tokens
    fp32_and_bf16 = 4+2
    logits = fp32_and_bf16*min(looked_at*c.vocab_size, HEAD_LOGITS)
    hidden = looked_at*4*c.hidden_size
    mlp_gradients = 0 if fast else tokens*10*_mlp_size(c)
    return max(logits+hidden, mlp_gradients)

def _products_bytes(
    model, # Causal language model whose layers `fast` takes
    lora_r:int, # Rank of the adapter
    mixed_precision:str, # Of products with the frozen base
)->float: # Of `lora_B` beside weights in 8 bits
    each = dict(bf16=0, int8=2, fp8=2+3)[mixed_precision]
    def outputs(layer, names): return sum(layer.get_submodule(n).out_features for n in names)
    groups = [(l,names) for l in decoder_layers(model) for names in fast_projections(l).values()]
    return each*lora_r*sum(len(names)*outputs(l, names) for l,names in groups)

def memory_plan(
    config, # Of the base model, from `AutoConfig`
    per_device_train_batch_size:int=4, # Packed sequences a GPU takes at once
    max_length:int=2048, # Tokens of a packed sequence
    gradient_checkpointing:bool=False, # Recompute whole layers
    optim:str='adamw_torch_fused', # Name in transformers
    torch_compile:bool=True, # Are layers that aren't `fast`'s compiled, at an activation budget of 0.7?
    load_in_4bit:bool=True, # NF4 with double quantisation
    load_in_fp8:bool=False, # Or fp8
    mixed_precision:str='bf16', # Of products with the frozen base
    lora_r:int=16, # Rank of the adapter
    lora_dropout:float=0.0, # With one, without either, shared or not all adapted, layers aren't `fast`'s
    lora_target_modules:tuple=LORA_TARGETS, # Layers it adapts
    supervised:float=0.5, # Share of tokens that the loss looks at
    shards:int=1, # Ranks that share the layers, by FSDP
)->dict: # GiB: `load`, `adapter`, `activations`, `head_peak`, `peak`; without CUDA's own half GiB
    "Predict the memory of a GPU in training."
    m = _bare_model(config)
    linear,targets = language_layers(m),resolve_targets(m, tuple(lora_target_modules))
    known = not why_not_known(m) and {n.split('.')[-1] for n in linear}<=set(targets)
    fast = (load_in_4bit or load_in_fp8) and not lora_dropout and shards==1 and known
    other = 'compiled' if torch_compile and shards==1 else 'eager'
    weights = sum(p.numel() for p in m.parameters())
    in_linear = sum(l.weight.numel() for l in linear.values())
    n_4bit,n_fp8 = in_linear*load_in_4bit,in_linear*load_in_fp8
    adapted = [l for n,l in linear.items() if n.split('.')[-1] in targets]
    n_lora = lora_r*sum(l.in_features+l.out_features for l in adapted)
    tokens = per_device_train_batch_size*max_length
    kept = _kept_bytes(config, max_length, lora_r, len(adapted))
    if fast: kept['fast'] += _more_norms(decoder_layers(m)[0])
    parts = dict(
        load=_load_bytes(n_4bit, weights-n_4bit-n_fp8/2, config.get_text_config().num_hidden_layers, fast, shards),
        adapter=_adapter_bytes(n_lora, optim, shards) + (_products_bytes(m, lora_r, mixed_precision) if fast else 0),
        activations=tokens*_activation_bytes(config, kept, 'fast' if fast else other, gradient_checkpointing),
        head_peak=_head_bytes(config, tokens, supervised, fast))
    return {k:v/2**30 for k,v in [*parts.items(), ('peak', sum(parts.values()))]}

# ------------------------------------------------------------------------------
# train: Every option of a run, packed sequences in a computable order, and TRL's `SFTTrainer`
# ------------------------------------------------------------------------------

@cache
def _read_options(): return docments(TrainConfig.__init__, full=True) # parsing takes 7 ms

def options()->dict: # name → `docment`, `anno` (type), `default`
    "The options of `TrainConfig`, as read from its source."
    return {k:v for k,v in _read_options().items() if k not in ('self','return')}

def option_part(
    name:str, # Of an option
)->str: # `weights`, `rows`, `rounding`, or an empty text where it changes nothing that is learnt
    "What an option does to a run."
    found = re.search(r'\{(\w+)\}$', options()[name]['docment'])
    return found[1] if found else ''

class Interval(NamedTuple):
    "Numbers from `low` to `high`, with an end or without."
    low_in:bool # `low` belongs to it
    low:float
    high:float
    high_in:bool # `high` belongs to it

    def holds(self,
        v:float, # A number
    )->bool: # False for NaN, too
        "Is a number in it?"
        return (self.low<v or self.low_in and v==self.low) and (v<self.high or self.high_in and v==self.high)

def option_range(
    name:str, # Of an option
)->Interval: # None where it has no interval
    "The interval of an option's values."
    m = re.search(r'([\[(])([\d.e-]+), ([\d.e-]+)([\])])( \{\w+\})?$', options()[name]['docment'])
    return Interval(m[1]=='[', float(m[2]), float(m[3]), m[4]==']') if m else None

_OTHERS = dict(base_model='MODEL_NAME MODEL_NAME_OR_PATH MODEL_ID', hub_model_id='OUTPUT_REPO',
    dataset_repo='DATASET DATASET_NAME DATASET_ID', load_best='LOAD_BEST_MODEL_AT_END',
    learning_rate='LR', num_train_epochs='EPOCHS NUM_EPOCHS NUM_EPOCH N_EPOCHS MAX_EPOCHS', warmup_ratio='WARMUP_STEPS',
    max_length='MAX_SEQ_LENGTH MAX_SEQ_LEN CUTOFF_LEN SEQUENCE_LEN MAX_LEN SEQ_LEN', optim='OPTIMISER OPTIMIZER',
    per_device_train_batch_size='MICRO_BATCH_SIZE BATCHSIZE', gradient_accumulation_steps='GRAD_ACCUM GRAD_ACC GRAD_ACCUM_STEPS',
    lora_r='LORA_RANK', lora_target_modules='LORA_TARGETS', seed='RANDOM_SEED', keep_checkpoints='SAVE_TOTAL_LIMIT',
    eval_steps='EVALUATION_STEPS')

OTHER_NAMES = {name:option for option,names in _OTHERS.items() for name in names.split()} # what other trainers call our options

def meant_option(
    name:str, # Of an environment variable
)->str: # Variable that was probably meant; None where the name is nobody's or is right
    "The option that a misspelt variable means."
    ours = [k.upper() for k in options()]
    if name in ours or name.startswith('SM_'): return # SageMaker's
    if name.upper() in ours: return name.upper()
    if name in OTHER_NAMES: return OTHER_NAMES[name].upper()
    part = [o for o in ours if '_' in name and (o.endswith('_'+name) or o.startswith(name+'_'))]
    if len(part)==1: return part[0]
    # other tools' own variables, and short names, are near by chance
    least = .93 if name.startswith(('WANDB_', 'HF_')) or len(name)<7 else .85
    near = difflib.get_close_matches(name, [*ours, *OTHER_NAMES], 1, least)
    return OTHER_NAMES.get(near[0], near[0]).upper() if near else None

def check_names(
    env:dict, # Environment
):
    "Refuse variables that nearly have an option's name."
    wrong = {k:o for k in env if env[k].strip() and (o := meant_option(k))}
    meant = ', '.join(dict.fromkeys(wrong.values()))
    if wrong: raise UserError(', '.join(wrong), "no option has this name", f"set {meant} instead, or unset it")

def env_options(
    env:dict=None, # Environment; `os.environ` where None
)->dict: # The options that it sets, in their types
    "Read options from environment variables, `max_steps` from `MAX_STEPS`."
    env,res = os.environ if env is None else env,{}
    check_names(env)
    for k,o in options().items():
        if (v := env.get(k.upper(), '').strip()) == '': continue
        kind = type(o['default'])
        wanted = {bool:'0 or 1', int:'a whole number', float:'a number'}.get(kind)
        if kind is str: refuse_secrets(**{k.upper():v})
        try: res[k] = str2bool(v) if kind is bool else kind(v)
        except (TypeError, ValueError):
            raise UserError(k.upper(), f"must be {wanted}, got {v!r}", "correct it or unset it") from None
    return res

PRESETS = {'16-examples':(1,2944), '24gb':(4,2048), '80gb':(16,2048)} # packed sequences a step, and tokens of one

BASELINE_TOKENS,BASELINE_RATE = 2944,2e-4 # of a step of the baseline recipe

def preset_options(
    name:str, # Key of `PRESETS`
)->dict: # `per_device_train_batch_size`, `max_length`, `learning_rate`
    "What a preset stands for."
    if name not in PRESETS:
        raise UserError("PRESET", f"no preset is called {name!r}", f"choose one of {', '.join(PRESETS)}")
    rows,length = PRESETS[name]
    rate = BASELINE_RATE*(rows*length/BASELINE_TOKENS)**.5
    return dict(per_device_train_batch_size=rows, max_length=length, learning_rate=round(rate, 6))

def parse_options(
    p, # `ArgumentParser` that knows the options of `TrainConfig`, and perhaps others
    argv:list=None, # Flags; `sys.argv[1:]` where None
    env:dict=None, # Environment; `os.environ` where None
)->dict: # Value of each option of the parser
    "Flags over the environment over a preset."
    given = env_options(env)
    p.allow_abbrev = False
    p.set_defaults(**given)
    preset = vars(p.parse_args(argv))['preset']
    if preset: p.set_defaults(**{**preset_options(preset), **given})
    return vars(p.parse_args(argv))

# of transformers' names, those that are tried here
OPTIMS = ('adamw_torch', 'adamw_torch_fused', 'adamw_8bit', 'adamw_bnb_8bit', 'paged_adamw_8bit', 'paged_adamw_32bit',
    'lion_32bit', 'lion_8bit', 'paged_lion_32bit', 'paged_lion_8bit', 'adafactor', 'sgd')

ONE_OF = dict(optim=OPTIMS, mixed_precision=('bf16', 'fp8', 'int8'),
    report_to=('wandb', 'trackio', 'tensorboard', 'none'), wandb_log_model=('checkpoint', 'false'))

def _bad_option(name, why, value): raise UserError(name.upper(), f"{why}, got {value!r}", "correct it or unset it")

def check_option(
    name:str, # Of an option
    value, # In its type
):
    "Refuse a value outside of an option's range."
    if isinstance(value, str): check_whole(name.upper(), value)
    if name in ONE_OF and value not in ONE_OF[name]:
        near = ''.join(f' ({v}?)' for v in difflib.get_close_matches(str(value), ONE_OF[name], 1))
        _bad_option(name, f"must be one of {', '.join(ONE_OF[name])}{near}", value)
    ends = option_range(name)
    if not ends or ends.holds(value): return
    if ends.low_in and value<ends.low: _bad_option(name, f"must be at least {ends.low:.10g}", value)
    low,high = 'at least' if ends.low_in else 'above','at most' if ends.high_in else 'below'
    _bad_option(name, f"must be {low} {ends.low:.10g} and {high} {ends.high:.10g}", value)

def check_repo_name(
    name:str, # Of an option
    repo:str, # Its value
):
    "Refuse what can't be the name of a Hub repo."
    from huggingface_hub.utils import HFValidationError, validate_repo_id
    if not repo: _bad_option(name, "must name a Hub repo such as your-name/your-repo", repo)
    if repo.count('/')!=1: _bad_option(name, "must have the form owner/name", repo)
    try: validate_repo_id(repo)
    except HFValidationError:
        _bad_option(name, "must be a name that the Hub allows "
            "(letters of ASCII, digits, - _ and . inside, neither -- nor .., at most 96)", repo)

def _check_8bit(c, bad):
    "Refuse what doesn't go with a base in fp8, or products in 8 bits."
    if c.load_in_fp8 and c.load_in_4bit: bad('load_in_fp8', "needs LOAD_IN_4BIT=0: the base is kept in one of them")
    if c.load_in_fp8 and c.fsdp: bad('load_in_fp8', "must be 0 with FSDP=1")
    if c.mixed_precision=='bf16': return
    if c.mixed_precision=='int8' and c.load_in_fp8: bad('mixed_precision', "must be bf16 or fp8 with LOAD_IN_FP8=1")
    if not c.load_in_4bit and not c.load_in_fp8: bad('mixed_precision', "must be bf16 with a base in bf16 (LOAD_IN_FP8=1 keeps it in fp8)")
    if c.fsdp or c.lora_dropout: bad('mixed_precision', "must be bf16 with FSDP=1 or with LORA_DROPOUT")

def check_config(
    c:TrainConfig, # To be checked
)->TrainConfig: # The same
    "Refuse values that would fail, or do nothing, hours later."
    def bad(k, why): _bad_option(k, why, getattr(c, k))
    for k in ('dataset_repo','hub_model_id'): check_repo_name(k, getattr(c, k))
    for k,v in c.asdict().items(): check_option(k, v)
    for k in ('base_model','output_dir','scorer','wandb_project'):
        if not getattr(c, k).strip(): bad(k, "must not be empty")
    lora_targets(c.lora_target_modules) # or say that they name nothing
    if c.fsdp and not c.optim.startswith('adamw_torch'): bad('optim', "must be adamw_torch or adamw_torch_fused with FSDP=1")
    _check_8bit(c, bad)
    if c.load_best and not c.eval_steps: bad('load_best', "needs EVAL_STEPS above 0, which finds the best adapter")
    if c.hub_model_id.lower()==c.base_model.lower():
        bad('hub_model_id', "must be another repo than BASE_MODEL, which the adapter would replace")
    c.output_dir = str(Path(c.output_dir).expanduser())
    return c

OPTION_GROUPS = dict(weights='what is learnt: all jobs of a run must agree on these', # part → heading in the help
    rows="how a step is split: may change between a run's jobs, and results then differ in rounding",
    rounding="speed and memory: may change between a run's jobs, and results then differ in rounding")

TRAIN_EXAMPLES = ('DATASET_REPO=YOU/talk HUB_MODEL_ID=YOU/phoque python train.py',
    'python train.py --dataset_repo YOU/talk --hub_model_id YOU/phoque --max_steps 20')

def run_parser(
    func, # Function that takes the options of a run, and perhaps others
    examples:tuple=(), # Command lines to show below the options
): # `ArgumentParser`
    "Parser of the options of a run, in groups by what they do to it."
    parts = {k:option_part(k) for k in options()}
    p = option_parser(func, examples, {title:[k for k in parts if parts[k]==part] for part,title in OPTION_GROUPS.items()})
    for a in p._actions: a.help = re.sub(r' \{\w+\}', '', a.help or '') # said by its group
    return p

def read_config(
    argv:list=None, # Flags; `sys.argv[1:]` where None
    env:dict=None, # Environment; `os.environ` where None
)->TrainConfig: # Checked
    "Options from flags, then the environment, then the defaults."
    @delegates(TrainConfig)
    def train(**kwargs): "Fine-tune a small chat model with NF4 QLoRA; resubmit the same command to continue."
    args = parse_options(run_parser(train, TRAIN_EXAMPLES), argv, env)
    return check_config(TrainConfig(**{k:args[k] for k in options()}))

def pack_lengths(
    lengths, # Tokens of each document
    max_length:int, # Tokens a packed sequence holds
)->list: # Rows, each a list of indices into `lengths`
    "Best-fit-decreasing bin packing."
    import numpy as np
    lengths = np.asarray(lengths)
    rows = []
    room,free = [[] for _ in range(max_length+1)],0 # room[r]: rows with r tokens left; bit r of free: is there one?
    for i in np.argsort(-lengths, kind='stable').tolist():
        n = int(lengths[i])
        fits = free>>n
        if fits:
            r = n + (fits & -fits).bit_length()-1
            row = room[r].pop()
            if not room[r]: free &= ~(1<<r)
        else:
            row,r = len(rows),max_length
            rows.append([])
        rows[row].append(i)
        room[r-n].append(row); free |= 1<<(r-n)
    return rows

def pack_dataset(
    ds, # Dataset of `input_ids` and `labels`, from `encode_dataset`
    max_length:int=2048, # Tokens a packed sequence holds
    seed:int=0, # Of their order
): # Dataset of `input_ids`, `labels` and `seq_lengths`, one packed sequence a row
    "Pack documents into sequences: a pure function of the data and the seed."
    import numpy as np, pyarrow as pa, pyarrow.compute as pc
    from datasets import Dataset
    cols = {k: ds.with_format('arrow')[:][k].combine_chunks() for k in ('input_ids','labels')}
    lengths = pc.list_value_length(cols['input_ids']).to_numpy()
    packs = pack_lengths(lengths, max_length)
    shuffled = np.random.default_rng(seed).permutation(len(packs)) # packing leaves them sorted by length
    packs = [packs[i] for i in shuffled]
    docs = np.concatenate(packs)
    def ends(sizes): return pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int32())
    flat = {k: v.take(pa.array(docs)).flatten().cast(pa.int32()) for k,v in cols.items()}
    tokens = ends([int(lengths[p].sum()) for p in packs])
    out = {k: pa.ListArray.from_arrays(tokens, v) for k,v in flat.items()}
    out['seq_lengths'] = pa.ListArray.from_arrays(ends([len(p) for p in packs]), pa.array(lengths[docs], pa.int32()))
    return Dataset(pa.table(out))

def draw_order(
    n_rows:int, # Rows of the packed dataset
    n_draws:int, # How many packed sequences the run draws, over all epochs
    seed:int=0, # Of the run
): # Array of `n_draws` row numbers
    "Which packed sequences a run draws, in order: each epoch a permutation of its own."
    import numpy as np
    epochs = -(-n_draws//n_rows)
    return np.concatenate([np.random.default_rng([seed,e]).permutation(n_rows) for e in range(epochs)])[:n_draws]

def doc_lengths(
    rows:list, # Rows of `pack_dataset`
    max_length:int, # Tokens of a packed sequence
)->list: # Of all packed sequences, one after the other
    "Tokens of each document; what fills a sequence up is one more, perhaps an empty one."
    return [n for r in rows for n in (*r['seq_lengths'], max_length-len(r['input_ids']))]

def collate_rows(
    rows:list, # Rows of `pack_dataset`
    max_length:int, # Every batch has this width, so that compiled code sees one shape
    pad_id:int, # Token that fills up a sequence
)->dict: # `input_ids`, `labels`, `position_ids` of shape (rows, max_length); flat `supervised` positions and their `targets`
    "Stack packed sequences; what fills one up has no labels."
    import numpy as np, torch
    ids,labels = np.full((len(rows), max_length), pad_id),np.full((len(rows), max_length), -100)
    for i,r in enumerate(rows):
        ids[i,:len(r['input_ids'])] = r['input_ids']
        labels[i,:len(r['labels'])] = r['labels']
    position = np.concatenate([np.arange(n) for n in doc_lengths(rows, max_length)]).reshape(ids.shape)
    batch = {k:torch.from_numpy(v) for k,v in dict(input_ids=ids, labels=labels, position_ids=position).items()}
    # a position is asked for the token after it
    follows = torch.nn.functional.pad(batch['labels'][:,1:], (0,1), value=-100).flatten()
    supervised = (follows!=-100).nonzero()[:,0]
    return dict(**batch, supervised=supervised, targets=follows[supervised])

def doc_starts(
    lengths:list, # From `doc_lengths`
    most:int, # Documents that the list has room for
    max_length:int, # Tokens of the longest document that there may be
)->dict: # `cu_seq_lens_q` and `_k`, `max_length_q` and `_k`
    "What the flash kernel asks of a batch: where its documents start, with empty ones at the end."
    import torch
    from itertools import accumulate
    starts = list(accumulate(lengths, initial=0))
    starts += starts[-1:]*(most+1-len(starts))
    cu = torch.tensor(starts, dtype=torch.int32)
    return dict(cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=max_length, max_length_k=max_length)

def stack_inputs(
    lengths:list, # From `doc_lengths`
    supervised, # Positions that the loss looks at
    fill:tuple, # Tiles and positions to fill up to
)->dict: # `tiles`, and `keep`: positions, where one beyond the last stands for none
    "What a `Stack` asks of a batch."
    import torch
    tiles = attention_tiles(lengths)
    tiles += [(0,)*5]*(fill[0]-len(tiles))
    keep = torch.nn.functional.pad(supervised, (0,fill[1]-len(supervised)), value=sum(lengths))
    return dict(tiles=torch.tensor(tiles, dtype=torch.int32), keep=keep)

def collate_packed(
    rows:list, # Rows of `pack_dataset`
    max_length:int, # Tokens of a packed sequence
    pad_id:int, # Token that fills up a sequence
    max_docs:int=0, # Most documents in a sequence, for `doc_starts`; 0 for another kernel
    fill:tuple=None, # Most tiles and supervised positions of a batch, for `stack_inputs`; None without a `Stack`
)->dict: # From `collate_rows`, `stack_inputs` and `doc_starts`
    "Make a batch of packed sequences."
    batch,lengths = collate_rows(rows, max_length, pad_id),doc_lengths(rows, max_length)
    if fill: batch |= stack_inputs(lengths, batch['supervised'], fill)
    if max_docs: batch |= doc_starts(lengths, len(rows)*(max_docs+1), max_length)
    return batch

def run_steps(
    cfg:TrainConfig, # Of the run
    n_rows:int, # Rows of the packed training set
)->int: # Optimizer steps of the whole run
    "How many optimizer steps a run has."
    per_step = cfg.per_device_train_batch_size*cfg.gradient_accumulation_steps
    return cfg.max_steps or max(1, round(cfg.num_train_epochs*n_rows/per_step))

def share_batch(
    cfg:TrainConfig, # Of the run
    ranks:int, # Processes, one a GPU
)->tuple: # Rows of a micro-batch, and micro-batches of a step, on each GPU
    "Share a step's packed sequences out: their number is the run's, however many GPUs there are."
    micro_batch,grad_accum = cfg.per_device_train_batch_size,cfg.gradient_accumulation_steps
    each,rest = divmod(micro_batch*grad_accum, ranks)
    if rest: raise UserError(
        f"PER_DEVICE_TRAIN_BATCH_SIZE {micro_batch} × GRADIENT_ACCUMULATION_STEPS {grad_accum}",
        f"{micro_batch*grad_accum} rows a step can't be shared by {ranks} GPUs", f"choose a multiple of {ranks}, or other GPUs")
    micro_batch = max(b for b in range(1, micro_batch+1) if each%b==0)
    return micro_batch,each//micro_batch

def run_memory(
    cfg:TrainConfig, # Of the run
    config, # Of its base model, from `AutoConfig`
    micro_batch:int, # Rows that a GPU takes at once
    ranks:int=1, # Processes, one a GPU
    checkpointing:bool=False, # Recompute whole layers
)->float: # GiB at the peak, with half a GiB for CUDA itself
    "What a run needs of a GPU's memory."
    same = ('max_length','optim','torch_compile','load_in_4bit','load_in_fp8','mixed_precision','lora_r','lora_dropout')
    opts = {k:getattr(cfg, k) for k in same}
    opts |= dict(gradient_checkpointing=checkpointing, shards=ranks if cfg.fsdp else 1)
    plan = memory_plan(config, micro_batch, lora_target_modules=lora_targets(cfg.lora_target_modules), **opts)
    return plan['peak'] + .5

class BatchFit(NamedTuple):
    "How a step's packed sequences are taken."
    micro_batch:int # Packed sequences that a GPU takes at once
    grad_accum:int # Times that it does so in a step
    checkpointing:bool # Recompute whole layers
    need:float # GiB at the peak

def fit_batch(
    cfg:TrainConfig, # Of the run
    config, # Of its base model, from `AutoConfig`
    ranks:int=1, # Processes, one a GPU
    room:float=float('inf'), # GiB of each GPU that a run can have
)->BatchFit: # It needs more than `room` where nothing fits
    "The fastest way to take a step's packed sequences that fits: as set, in smaller batches, or with layers recomputed."
    most,grad_accum = share_batch(cfg, ranks)
    for checkpointing in sorted({cfg.gradient_checkpointing, True}):
        for b in range(most, 0, -1):
            if most*grad_accum%b: continue
            fit = BatchFit(b, most*grad_accum//b, checkpointing, run_memory(cfg, config, b, ranks, checkpointing))
            if fit.need<=room: return fit
    return fit

class RowWork(NamedTuple):
    "Of each packed sequence, what it asks of a GPU, as arrays."
    tiles:'np.ndarray' # `TILE`s of attention
    supervised:'np.ndarray' # Tokens that the loss looks at
    pairs:'np.ndarray' # Pairs of tokens that attention looks at

def row_work(
    packed, # From `pack_dataset`
    max_length:int, # Tokens of a packed sequence
)->RowWork:
    "What a packed sequence asks of a GPU, beside its tokens."
    import numpy as np
    cols = {k: packed.with_format('arrow')[:][k].combine_chunks() for k in ('labels','seq_lengths')}
    (labels,first),(sizes,doc) = ((v.flatten().to_numpy(), v.offsets.to_numpy()[:-1]) for v in cols.values())
    def per_row(v, starts): return np.add.reduceat(v, starts, dtype=np.int64)
    def tiles_of(n): return -(-n//TILE)
    rest = max_length-per_row(sizes, doc) # what fills a sequence up is a document, too
    tiles = per_row(tiles_of(sizes), doc)+tiles_of(rest)
    supervised = per_row(labels!=-100, first)-(labels[first]!=-100) # a sequence's first token follows nothing
    return RowWork(tiles, supervised, per_row(sizes.astype(np.int64)**2, doc)+rest**2)

HEAD_PAIRS = 400 # Pairs that attention looks at while the head works for one supervised token: 2.6 µs, on an H200

def deal_rows(
    order, # From `draw_order`
    work, # Of each packed sequence
    micro_batch:int, # Rows of a batch
    batches:int, # Of a step, on all GPUs
): # The same, in another order within each step
    "Make the batches of a step take about equally long."
    import numpy as np
    steps = order.reshape(-1, batches*micro_batch)
    turns = np.arange(batches*micro_batch).reshape(micro_batch, batches)
    turns[1::2] = turns[1::2,::-1]
    heaviest = np.argsort(-work[steps], axis=1, kind='stable')
    return np.take_along_axis(steps, heaviest[:,turns.T.flatten()], 1).flatten()

def fill_sizes(
    counts:tuple, # Of each packed sequence, from `row_work`: tiles and supervised tokens
    order, # Rows in the order in which they are taken
    micro_batch:int, # Rows of a batch
)->tuple: # The same of the batches that have most
    "What batches are filled up to, for `collate_packed`."
    import numpy as np
    return tuple(int(np.add.reduceat(c[order], np.arange(0, len(order), micro_batch)).max()) for c in counts)

def events_callback(
    events, # Namespace with any of `on_start`, `on_step`, `on_log`, `on_save`
): # `TrainerCallback`
    "Call plain functions at the trainer's events."
    from transformers import TrainerCallback
    def call(name, *args): return getattr(events, name, lambda *_: None)(*args)
    class Events(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kw):
            set_rate(optimizer, getattr(lr_scheduler, 'scheduler', lr_scheduler)) # inside of accelerate's
            state.compute_steps(args, state.max_steps) # how often to log and save is this job's, not its checkpoint's
            call('on_start', model, state.global_step)
        def on_step_end(self, args, state, control, model=None, **kw):
            if call('on_step', model, state.global_step): control.should_training_stop = control.should_save = True
        def on_log(self, args, state, control, logs=None, **kw): call('on_log', state.global_step, logs)
        def on_save(self, args, state, control, **kw):
            call('on_save', Path(args.output_dir)/f'checkpoint-{state.global_step}', state.global_step)
    return Events()

def rate_at(
    step:int, # Optimizer steps done
    steps:int, # Of the whole run
    warmup_ratio:float=0.03, # Share of the steps in which the rate rises
)->float: # Share of the peak; above 0 for every step of the run
    "The learning rate of the next step."
    warmup = min(math.ceil(warmup_ratio*steps), steps-1)
    if step<warmup: return (step+1)/(warmup+1)
    return .5*(1+math.cos(math.pi*min((step-warmup)/(steps-warmup), 1)))

def set_rate(
    optimizer, # Of a trainer
    scheduler, # Its `LambdaLR`, perhaps loaded from a checkpoint
):
    "Give the optimizer the rate of the next step, also where the run has become longer than its checkpoint says."
    rates = [base*of(scheduler.last_epoch) for base,of in zip(scheduler.base_lrs, scheduler.lr_lambdas)]
    for group,rate in zip(optimizer.param_groups, rates): group['lr'] = rate
    scheduler._last_lr = rates

def compile_layers(
    model, # From `add_lora`
    budget:float=0.7, # Share of activations that is kept
):
    "Compile every decoder layer on its own."
    import torch._functorch.config
    torch._functorch.config.activation_memory_budget = budget # read when a layer is first run
    for layer in decoder_layers(model.get_base_model()): layer.compile()

class BackgroundSaves:
    "What a `Trainer` saves, copied at once and written by a thread."
    writer = ThreadPoolExecutor(1, 'checkpoint') # one, which writes in the order of the calls

    def __init__(self, *args, **kwargs):
        self.writes = [] # of the newest checkpoint, as futures
        super().__init__(*args, **kwargs)

    def _save(self, output_dir=None, state_dict=None):
        if not self.args.should_save: return
        self.written()
        self.writes = []
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        adapter = state_dict or {n:p for n,p in self.model.named_parameters() if p.requires_grad}
        self.save_later(lambda d: self.model.save_pretrained(output_dir, state_dict=d, save_embedding_layers=False), adapter)

    def _save_optimizer_and_scheduler(self, output_dir):
        states = dict(optimizer=self.optimizer, scheduler=self.lr_scheduler)
        if self.args.should_save: self.write_later(output_dir, {k:s.state_dict() for k,s in states.items()})

    def train(self, *args, **kwargs):
        "As `Trainer` does; the last checkpoint is on the disk when it returns."
        out = super().train(*args, **kwargs)
        self.written()
        return out

def _map_tensors(f, state):
    import torch
    from torch.utils._pytree import tree_map
    return tree_map(lambda t: f(t) if torch.is_tensor(t) else t, state)

@patch
def save_later(self:BackgroundSaves,
    write, # Function of the copy
    state, # Nested dicts and lists, with tensors in them
):
    "Copy tensors where they lie; a thread brings the copies to the CPU, and has them written."
    import torch
    from contextlib import nullcontext
    copies = _map_tensors(lambda t: t.detach().clone(), state)
    copied = torch.cuda.current_stream().record_event() if torch.cuda.is_available() else None
    def run():
        if copied: copied.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()) if copied else nullcontext():
            write(_map_tensors(lambda t: t.cpu(), copies))
    self.writes.append(self.writer.submit(run))

@patch
def written(self:BackgroundSaves):
    "Wait until all of the newest checkpoint lies on the disk."
    for w in self.writes: w.result()

@patch
def write_later(self:BackgroundSaves,
    output_dir:str, # `checkpoint-N`
    states:dict, # File name without `.pt` → what it will hold
):
    "Have states written by `torch.save`."
    import torch
    for k,s in states.items(): self.save_later(lambda s, k=k: torch.save(s, f'{output_dir}/{k}.pt'), s)

def _trainer_class(shard):
    import trl
    class Trainer(BackgroundSaves, trl.SFTTrainer):
        "TRL's, with the loss of `fast`, and checkpoints that training doesn't wait for."

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            nll = model(**{k:v for k,v in inputs.items() if k!='labels'})
            ranks = self.accelerator.num_processes # all ranks' tokens count; gradients are averaged over ranks
            return nll*ranks/num_items_in_batch.clamp(min=1)

        def create_scheduler(self, num_training_steps, optimizer=None):
            from torch.optim.lr_scheduler import LambdaLR
            def of(step): return rate_at(step, num_training_steps, self.warmup_ratio)
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, of)
            return self.lr_scheduler

        def create_model_card(self, *args, **kwargs): "Written once, at the end, by the job."
    return sharded_trainer(Trainer) if shard else Trainer

def trainer_args(
    cfg:TrainConfig, # Of the run
    steps:int, # Of the whole run
    fit:BatchFit, # How a step is taken
    shard:bool, # Do ranks share the layers?
): # `trl.SFTConfig`
    "A run's options in TRL's words."
    import torch
    from trl import SFTConfig
    cuda = torch.cuda.is_available()
    names = 'output_dir learning_rate weight_decay max_grad_norm optim logging_steps save_steps seed'.split()
    args = SFTConfig(**{k:getattr(cfg, k) for k in names}, **shard_options(shard), max_steps=steps, save_strategy='steps',
        gradient_checkpointing=fit.checkpointing,
        gradient_checkpointing_kwargs=dict(use_reentrant=False) if fit.checkpointing else None,
        per_device_train_batch_size=fit.micro_batch, gradient_accumulation_steps=fit.grad_accum,
        bf16=cuda, use_cpu=not cuda, dataloader_pin_memory=cuda, accelerator_config=dict(non_blocking=cuda),
        ddp_find_unused_parameters=False, ddp_broadcast_buffers=False,
        max_length=None, remove_unused_columns=False,
        dataset_kwargs=dict(skip_prepare_dataset=True), train_sampling_strategy='sequential',
        report_to='none', disable_tqdm=True, logging_nan_inf_filter=False, log_level_replica='error')
    args._n_gpu = min(args.n_gpu, 1) # no `nn.DataParallel`
    return args

def share_stack(
    trainer, # Of this rank
    stack, # From `fast_layers`; it averages its gradients over the ranks
):
    "When training begins, take rank 0's adapter on every rank, and no `DistributedDataParallel`."
    from torch.distributed import broadcast
    prepare = trainer.accelerator.prepare_model
    def prepare_model(model, **kwargs):
        for p in stack.params: broadcast(p.data, 0)
        return prepare(model, **{**kwargs, 'evaluation_mode':True})
    trainer.accelerator.prepare_model = prepare_model

def fit_card(
    cfg:TrainConfig, # Of the run
    config, # Of its base model
    ranks:int, # Processes, one a GPU
)->tuple: # `BatchFit`, and GiB that this card leaves
    "Fit a step's packed sequences to this process's GPU, and say in the log where that isn't as set."
    room = card_room()
    fit = fit_batch(cfg, config, ranks, room)
    as_set = (*share_batch(cfg, ranks), cfg.gradient_checkpointing)
    if fit[:3]!=as_set:
        step = f"micro-batch {fit.micro_batch} × {fit.grad_accum} accumulation" + " with layers recomputed"*fit.checkpointing
        log.info(f"memory: {step} fits {room:.0f} GiB")
    return fit,room-fit.need

def run_order(
    cfg:TrainConfig, # Of the run
    work:RowWork, # Of its packed sequences
    fit:BatchFit, # How a step takes them
    ranks:int, # Processes, one a GPU
): # Array of row numbers
    "All packed sequences that a run takes, in order."
    n_rows,batches = len(work.pairs),fit.grad_accum*ranks
    drawn = draw_order(n_rows, run_steps(cfg, n_rows)*fit.micro_batch*batches, cfg.seed)
    return deal_rows(drawn, work.pairs+HEAD_PAIRS*work.supervised, fit.micro_batch, batches)

def _set_up_layers(cfg, model, fit, left, shard):
    "A `Stack` where there can be one, which may keep weights in what is `left` of the GPU; else compiled layers."
    import torch
    if cfg.load_in_fp8: base_in_fp8(model)
    stack = None if shard else fast_layers(model, cfg.max_length, fit.checkpointing, cfg.mixed_precision)
    if stack: keep_weights(stack, left)
    elif torch.cuda.is_available() and cfg.torch_compile and not shard: compile_layers(model, cfg.activation_memory_budget)
    return stack

def _collator(cfg, model, tok, packed, fill):
    from functools import partial
    varlen = model.config.get_text_config()._attn_implementation=='varlen'
    max_docs = max(map(len, packed['seq_lengths'])) if varlen and not fill else 0
    return partial(collate_packed, max_length=cfg.max_length, pad_id=tok.pad_token_id, max_docs=max_docs, fill=fill)

def _set_up_loss(trainer, tok, cfg, stack, ranks, shard):
    for p in trainer.model.parameters():
        if p.requires_grad: p.data = p.data.float()
    model = trainer.model.get_base_model()
    add_supervised_head(model, stack)
    if stack and ranks>1: share_stack(trainer, stack)
    if not shard: check_packed(model, tok, cfg.max_length, stack)

def make_trainer(
    cfg:TrainConfig, # Of the run
    model, # From `add_lora`
    tok, # From `load_tokenizer`
    packed, # From `pack_dataset`
    events=None, # Functions to call at the trainer's events; None for none
): # `trl.SFTTrainer`, ready for `.train(resume_from_checkpoint=…)`
    "TRL's trainer over the whole run's packed sequences in their computed order."
    from transformers import PrinterCallback, ProgressCallback, set_seed
    rank,ranks = (int(os.environ.get(k, d)) for k,d in (('RANK',0), ('WORLD_SIZE',1))) # as torchrun sets them
    shard = cfg.fsdp and ranks>1
    fit,left = fit_card(cfg, model.config, ranks)
    stack = _set_up_layers(cfg, model, fit, left, shard)
    work = row_work(packed, cfg.max_length)
    order = run_order(cfg, work, fit, ranks)
    fill = fill_sizes((work.tiles,work.supervised), order, fit.micro_batch) if stack else None
    args = trainer_args(cfg, run_steps(cfg, len(packed)), fit, shard)
    if shard: prepare_sharding(args.device, model)
    trainer = _trainer_class(shard)(model=model, args=args, train_dataset=packed.select(order), processing_class=tok,
        data_collator=_collator(cfg, model, tok, packed, fill), callbacks=[events_callback(events)])
    trainer.warmup_ratio = cfg.warmup_ratio # a share of the steps
    _set_up_loss(trainer, tok, cfg, stack, ranks, shard)
    if rank: set_seed(cfg.seed+rank) # every rank has its own dropout
    for shown in (PrinterCallback, ProgressCallback): trainer.remove_callback(shown)
    return trainer

def step_line(
    step:int, # Optimizer steps done
    total:int, # Of the whole run
    m:dict, # The trainer's metrics
)->str: # Such as `step 20/100 · loss 2.314 · lr 1.8e-04 · grad 0.71`
    "One line of metrics for the console."
    s = f"step {step}/{total} · loss {m['loss']:.3f}"
    more = (('learning_rate','lr','.1e'), ('grad_norm','grad','.2f'),
        ('tokens_per_second','tokens/s',',.0f'), ('gpu_gib','GiB','.1f'))
    for k,name,fmt in more:
        if k in m: s += f" · {name} {m[k]:{fmt}}"
    return s

def _held_out_turns(n, micro_batch, ranks): # batches of `n` rows, and which of them this rank takes
    batches = [range(i, min(i+micro_batch, n)) for i in range(0, n, micro_batch)]
    rounds = -(-len(batches)//ranks.num_processes) # as many on every rank: they may share the layers
    return batches,range(ranks.process_index, rounds*ranks.num_processes, ranks.num_processes)

def held_out_loss(
    trainer, # From `make_trainer`
    packed, # Held-out rows, packed
    stop=lambda: False, # Asked before each batch, on every rank: true gives up
)->float: # Mean negative log-likelihood of a supervised token, in nats; None where it was given up
    "Loss on conversations that training never sees."
    import torch
    model,here = trainer.model,trainer.accelerator
    nll,n = 0.,0
    batches,turns = _held_out_turns(len(packed), trainer.args.per_device_train_batch_size, here)
    with (preserve_training_state(model, trainer.processing_class), trainer.compute_loss_context_manager(),
        torch.inference_mode(False), torch.no_grad()):
        for i in turns:
            if stop(): return
            rows = trainer.data_collator([packed[k] for k in batches[i%len(batches)]])
            wanted = 'input_ids','position_ids','supervised','targets'
            batch = {k:rows[k].to(here.device) for k in wanted}
            loss = model(**batch).item()
            if i<len(batches):
                nll += loss
                n += len(batch['targets'])
    nll,n = here.reduce(torch.tensor([nll, n], dtype=torch.float64, device=here.device), 'sum').tolist()
    return nll/max(n,1)

# what a measurement and each of its sequences cost, in sequences trained: 0.11 s for one, 0.24 for four, 0.40 for eight,
# where 0.05 s train one
EVAL_START,EVAL_ROW = 1.,1.25

def eval_plan(
    cfg:TrainConfig, # Of the run
    n_held:int, # Packed held-out sequences that there are
)->tuple: # Steps between two measurements, and packed sequences of each; (0, 0) where nothing is measured
    "When the held-out loss is measured, and on how many packed sequences."
    if not cfg.eval_steps or not n_held: return 0,0
    rows = cfg.per_device_train_batch_size*cfg.gradient_accumulation_steps
    fewest = math.ceil((EVAL_START+EVAL_ROW)/(cfg.eval_share*rows)-1e-9) # steps in whose share one sequence fits
    every = cfg.eval_steps*math.ceil(fewest/cfg.eval_steps)
    fit = int((cfg.eval_share*every*rows-EVAL_START)/EVAL_ROW)
    return every,max(1, min(n_held, fit))

# ------------------------------------------------------------------------------
# resume: Checkpoints on the Hub: publish, verify, restore, and stop in time
# ------------------------------------------------------------------------------

MANIFEST = 'manifest.json'

STATE_FILES = re.compile(r'(adapter_model|best_adapter)\.safetensors|(adapter_config|trainer_state)\.json|(optimizer|scheduler)\.pt|'
    r'rng_state(_\d+)?\.pth|samples\.parquet|metrics\.jsonl')

# and a random state: without one of these `Trainer` would begin with a new one, and not say so
NEEDED = {'adapter_model.safetensors','adapter_config.json','optimizer.pt','scheduler.pt','trainer_state.json'}

def file_sha256(
    path:Path, # Of a file
)->str: # Hex digest
    "The sha256 of a file's content."
    with open(path, 'rb') as f: return hashlib.file_digest(f, 'sha256').hexdigest()

def write_manifest(
    folder:Path, # A finished `checkpoint-N`
    run:dict, # What the run is: its id, identity and commits
)->dict: # The manifest
    "Seal a checkpoint: list its files with size and hash, beside what the run is."
    folder = Path(folder)
    ours = [p for p in sorted(folder.iterdir()) if STATE_FILES.fullmatch(p.name)]
    files = {p.name: dict(size=p.stat().st_size, sha256=file_sha256(p)) for p in ours}
    m = dict(step=int(folder.name.split('-')[1]), files=files, run=run)
    tmp = folder/f'{MANIFEST}.tmp'
    tmp.write_text(json.dumps(m, indent=1)); tmp.rename(folder/MANIFEST)
    return m

AUTOS = ('AutoModelForCausalLM','AutoModelForImageTextToText') # what `resolve_base` gives

def _is_number(v): return type(v) in (int,float) and abs(v)<1e15

def _is_count(v): return v is None or type(v) is int and 0<=v<2**53

def _is_name(v): return v is None or isinstance(v, str) and len(v)<=1000

def _is_setting(v): return _is_name(v) or type(v) is bool or _is_number(v)

def _is_list(v, each): return isinstance(v, list) and all(map(each, v))

def _is_eval(v): return _is_list(v, _is_number) and len(v)==2

def _is_run_id(v): return isinstance(v, str) and bool(re.fullmatch(r'[\w-]{1,64}', v)) # it can name a folder

def _is_arithmetic(v): return not v or isinstance(v, dict) and all(map(_is_setting, v.values()))

def _is_identity(v):
    def good(x): return _is_setting(x) or _is_list(x, _is_name)
    return isinstance(v, dict) and bool(v) and all(_is_name(k) and good(x) for k,x in v.items())

def _is_base(v):
    if not isinstance(v, dict) or not all(map(_is_name, v.values())): return False
    return not v or isinstance(v.get('id'), str) and v.get('auto', AUTOS[0]) in AUTOS

def is_run(
    run, # As read from a repo
)->bool: # Has it an id that can name a folder, and options?
    "Is this what a run is? Whoever can write to the repo could have written anything."
    checks = dict(id=_is_run_id, identity=_is_identity, arithmetic=_is_arithmetic, base=_is_base,
        repo=_is_name, dataset_revision=_is_name, published=_is_name, fresh_start=_is_count, total=_is_count, eval_rows=_is_count,
        seconds=lambda v: _is_list(v, _is_number), evals=lambda v: _is_list(v, _is_eval))
    empty = dict(base={}, seconds=[], evals=[])
    return isinstance(run, dict) and all(good(run.get(k, empty.get(k))) for k,good in checks.items())

MOST_MANIFEST = 16<<20 # bytes of a manifest or of `run.json`; a year's evaluations fit

def _is_of_folder(m, path): return type(m['step']) is int and f"checkpoint-{m['step']}"==path.parent.name

def _is_complete(m, path): return NEEDED<=set(m['files']) and any(n.startswith('rng_state') for n in m['files'])

def _lists_files(m, path):
    def is_size(v): return type(v) is int and v>=0
    return all(STATE_FILES.fullmatch(n) and is_size(f['size']) and re.fullmatch('[0-9a-f]{64}', f['sha256']) for n,f in m['files'].items())

def _names_run(m, path): return is_run(m['run'])

def read_manifest(
    path:Path, # A `checkpoint-N/manifest.json`
)->dict: # With `step`, `files` and `run`
    "Read a manifest; a `ValueError` says what is wrong with it."
    if not path.is_file(): raise ValueError("it has no manifest: it was never finished")
    try:
        m = read_json(path, most=MOST_MANIFEST)
        good = all(check(m, path) for check in (_is_of_folder, _is_complete, _lists_files, _names_run))
    except (ValueError, TypeError, KeyError, AttributeError): good = False
    if not good: raise ValueError("its manifest is damaged")
    return m

def _is_whole(v):
    "Has every tensor the bytes that its shape says?"
    import torch
    if isinstance(v, dict): v = list(v.values())
    if isinstance(v, torch.Tensor):
        return v.device.type=='cpu' and v.numel()*v.element_size()<=v.untyped_storage().nbytes()
    return all(map(_is_whole, v)) if isinstance(v, (list,tuple,set)) else True

def check_plain(
    path:Path, # Written by `torch.save`
):
    "Refuse a file that holds anything but tensors and plain values."
    import torch
    from transformers.trainer_pt_utils import safe_globals # what `Trainer` itself allows: numpy's random state
    from zipfile import ZIP_STORED, ZipFile
    try:
        with ZipFile(path) as z: plain = all(i.compress_type==ZIP_STORED for i in z.infolist()) # nothing unpacks to more
        with safe_globals(): good = plain and _is_whole(torch.load(path, map_location='cpu', weights_only=True))
    except Exception: good = False
    if not good: raise ValueError(f"{path.name} holds something other than tensors: it is not opened")

def check_state(
    folder:Path, # A `checkpoint-N`
    step:int, # N
):
    "Refuse a trainer_state.json that `Trainer` can't read, or that names files."
    from dataclasses import fields
    from transformers import TrainerState
    state = read_json(Path(folder)/'trainer_state.json')
    is_step = type(state.get('global_step')) is int and state['global_step']==step
    is_known = set(state)<={f.name for f in fields(TrainerState)}
    has_log = isinstance(state.get('log_history') or [], list)
    good = is_step and is_known and has_log and state.get('best_model_checkpoint') is None
    if not good: raise ValueError("trainer_state.json isn't what Trainer wrote")

def _check_file(folder, name, entry):
    p = safe_path(folder, name, MANIFEST)
    if not p.is_file(): raise ValueError(f"{name} is missing")
    good = not p.is_symlink() and p.stat().st_size==entry['size'] and file_sha256(p)==entry['sha256']
    if not good: raise ValueError(f"{name} is damaged")

def read_checkpoint(
    folder:Path, # A `checkpoint-N`
)->dict: # Its manifest
    "Hold a checkpoint against its manifest; a `ValueError` says what is wrong."
    folder = Path(folder)
    m = read_manifest(folder/MANIFEST)
    for name,entry in m['files'].items(): _check_file(folder, name, entry)
    for name in m['files']:
        if name.endswith(('.pt','.pth')): check_plain(folder/name)
    try:
        for name in m['files']:
            if name.endswith('.safetensors'): read_header(folder/name)
        check_state(folder, m['step'])
    except UserError as e: raise ValueError(str(e)) from None
    for p in folder.iterdir(): # `Trainer` takes more than these where it finds more
        if p.name not in {*m['files'], MANIFEST}: shutil.rmtree(p) if p.is_dir() and not p.is_symlink() else p.unlink()
    return m

def _inner(e): return e.__cause__ or e.__context__

def hub_answer(
    e:Exception, # What a client raised
)->Exception: # The innermost reason where the Hub gave no answer
    "The Hub's own answer inside what a client made of it."
    while getattr(e, 'response', None) is None and _inner(e): e = _inner(e)
    return e

def _passing(e):
    "Could the same call succeed later?"
    from httpx2 import HTTPError
    status = getattr(getattr(e, 'response', None), 'status_code', None)
    if m := re.search(r'HTTP status client error \((\d+)', str(e)): status = int(m[1]) # hf_xet's ConnectionError
    if status: return status in (408,409,412,425,429) or status>=500
    if isinstance(e, (HTTPError, ConnectionError, TimeoutError)): return True
    if _inner(e): return _passing(_inner(e)) # an upload's RuntimeError, transformers' OSError, one of our own lines
    return type(e) is RuntimeError or str(e).startswith('Consistency check failed') # hf_xet's; a short download

class NotNow(UserError):
    "What stops a publication and may pass while training goes on."

def spell_seconds(
    seconds:float, # A duration
)->str: # Such as `20 s` or `43 min`
    "A duration to read."
    return f"{seconds:.0f} s" if seconds<120 else f"{seconds/60:.0f} min"

def retry_after(
    e:Exception, # What a client raised
)->float: # Seconds that the Hub asks to wait; 0 where it doesn't say
    "The wait that an answer of the Hub names."
    answer = getattr(hub_answer(e), 'response', None)
    said = answer.headers.get('Retry-After', '') if answer is not None else ''
    return float(said) if said.isdigit() else 0.

def _is_own(e): # does it say itself what it is and what to do?
    return isinstance(e, UserError) or getattr(hub_answer(e), 'response', None) is None and not _passing(e)

def patiently(
    call, # Function without arguments that asks something of the Hub
    what:str, # What it is about, such as "model repo org/name"
    until:float=float('inf'), # `time.monotonic()` after which to give up
    wait:float=1.0, # Seconds before the first repeat; doubles up to a minute
    pause=time.sleep, # Waits that many seconds; may raise to give up
): # What `call` returns
    "Repeat a call to the Hub until it succeeds or can't."
    from httpx2 import HTTPError
    while True:
        try: return call()
        except (HTTPError, OSError, RuntimeError, UserError) as e: err = e
        said = err if _is_own(err) else hub_problem(hub_answer(err), what)
        if not (isinstance(err, NotNow) or _passing(err)): raise said from None
        asked = max(wait, retry_after(err))
        if time.monotonic()+asked>until:
            late = f"it would be tried again in {spell_seconds(asked)}, and the time is up"
            raise UserError(said.what, f"{said.value}; {late}", said.remedy) from None
        shown = said if _is_own(err) else f"{what}: {hub_problem(hub_answer(err), 'the Hub')}"
        log.warning(f"{shown}; trying again in {spell_seconds(asked)}")
        pause(asked); wait = min(2*wait, 60)

class HubBranch:
    "One branch of a Hub repo, and commits to it that happen once or not at all."
    def __init__(self,
        repo:str, # Model repo, `owner/name`
        branch:str='main', # Made when missing
        endpoint:str=None, # Hub; HF_ENDPOINT where None
        token:str=None, # HF_TOKEN where None
    ):
        from huggingface_hub import HfApi
        self.api,self.name = HfApi(endpoint=endpoint, token=token),f"model repo {repo}"
        self.repo,self.branch = repo,branch
        self.head,self.public = None,False # the newest commit that we know; was the repo public when we looked?

    def rewritten(self):
        "The error where the history that we know is gone."
        return UserError(f"{self.repo}@{self.branch}", "another job is writing there and has dropped its history",
            "let it finish, or choose another HUB_MODEL_ID")

    def newest(self):
        "The branch's newest commit."
        return self.api.list_repo_commits(self.repo, revision=self.branch)[0]

    def moved(self)->bool: # Has someone written since we looked?
        "Compare the branch with what we know of it."
        return patiently(self.newest, self.name).commit_id!=self.head

@patch
def prepare(self:HubBranch,
    until:float=float('inf'), # `time.monotonic()` after which to give up
):
    "Make the repo (private, gated) and the branch when missing, and read where the branch is."
    def make():
        private_repo(self.api, self.repo)
        if self.branch!='main': self.api.create_branch(self.repo, branch=self.branch, exist_ok=True)
        self.head = self.newest().commit_id
    patiently(make, self.name, until)
    return self

@patch
def _check_private(self:HubBranch):
    "Ask again before each commit, since a repo's owner may change that at any time."
    self.public = False
    try: check_private(self.api, self.repo)
    except UserError as e:
        self.public = True
        raise NotNow(*e.args) from None

@patch
def _commit_once(self:HubBranch, operations, title):
    from httpx2 import HTTPError
    self._check_private()
    on = dict(revision=self.branch, parent_commit=self.head)
    try: return self.api.create_commit(self.repo, operations, commit_message=title, **on).oid
    except (HTTPError, RuntimeError, OSError) as e: err = e
    now = self.newest()
    if now.commit_id==self.head: raise err
    if now.title==title: return now.commit_id # it had landed; only the answer was lost
    raise UserError(f"{self.repo}@{self.branch}", f"another job has written {now.title!r} there",
        "let it finish, or choose another HUB_MODEL_ID")

@patch
def commit(self:HubBranch,
    operations:list, # Of huggingface_hub: what to add and delete
    title:str, # Must be different for every commit: it tells whether an unanswered one landed
    until:float=float('inf'), # `time.monotonic()` after which to give up
    wait:float=1.0, # Seconds before the first repeat
    pause=time.sleep, # As of `patiently`
)->str: # The commit's id
    "One atomic commit to a private repo, repeated until it has landed or can't."
    self.head = patiently(lambda: self._commit_once(operations, title), f"{self.name}: {title!r}", until, wait, pause)
    return self.head

@patch
def squash(self:HubBranch,
    until:float=float('inf'), # `time.monotonic()` after which to give up
):
    "Drop the branch's history, which counts as storage; its files stay."
    title = f"squashed {os.urandom(4).hex()}"
    def once():
        now = self.newest()
        if now.commit_id==self.head: self.api.super_squash_history(self.repo, branch=self.branch, commit_message=title)
        elif now.title!=title:
            raise UserError(f"{self.repo}@{self.branch}",
                f"another job has written {now.title!r} there, so its history is left alone", "let it finish")
        return self.newest().commit_id
    self.head = patiently(once, f"{self.name}: history", until)

@patch
def send(self:HubBranch,
    operation, # `CommitOperationAdd`
    until:float=float('inf'), # `time.monotonic()` after which to give up
    wait:float=1.0, # Seconds before the first repeat
    pause=time.sleep, # As of `patiently`
):
    "Upload a large file ahead of the commit that names it."
    def once(): self.api.preupload_lfs_files(self.repo, [operation], revision=self.branch, free_memory=False)
    patiently(once, f"{self.name}: {operation.path_in_repo}", until, wait, pause)

@patch
def check_write(self:HubBranch,
    until:float=float('inf'), # `time.monotonic()` after which to give up
):
    "Write to the repo and take it back."
    name = f"write-check-{os.urandom(4).hex()}"
    patiently(lambda: self.api.create_branch(self.repo, branch=name, exist_ok=True), self.name, until)
    patiently(lambda: self.api.delete_branch(self.repo, branch=name), self.name, until)

RUN_FILE = 'run.json'

class Checkpoints:
    "The checkpoints of a run, on a branch of its Hub repo."
    def __init__(self,
        branch:HubBranch, # Prepared
        keep:int=2, # Newest checkpoints that stay
    ):
        self.branch,self.keep = branch,keep
        self.found = None # steps, once they are known
        self.stale = [] # steps of an abandoned run, removed when the next one begins
        self.history = 0 # bytes sent since the last squash

    def files(self)->list: # Paths
        "What is on the branch."
        from huggingface_hub.errors import RevisionNotFoundError
        b = self.branch
        def ask():
            try: return b.api.list_repo_files(b.repo, revision=b.head)
            except RevisionNotFoundError: raise b.rewritten() from None
        return patiently(ask, b.name)

@patch
def steps(self:Checkpoints)->list: # Ascending
    "Steps that have a folder with a manifest on the branch."
    if self.found is None: # from here on only our own commits change it
        rx = re.compile(rf'checkpoint-(0|[1-9]\d*)/{re.escape(MANIFEST)}')
        self.found = sorted(int(m[1]) for f in self.files() if (m := rx.fullmatch(f)))
    return self.found

@patch
def begin_run(self:Checkpoints,
    run:dict, # What the run is
    until:float=float('inf'), # `time.monotonic()` after which to give up
):
    "One commit: this run is the branch's from now on, and an abandoned one's checkpoints leave it."
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    if self.stale: self.keep_aside(until)
    old = [CommitOperationDelete(f'checkpoint-{s}/', is_folder=True) for s in self.stale]
    text = json.dumps(run, indent=1).encode()
    title = f"run {run['id']} {hashlib.sha256(text).hexdigest()[:8]}"
    self.branch.commit([CommitOperationAdd(RUN_FILE, text), *old], title, until)
    self.stale = []

@patch
def fetch(self:Checkpoints,
    name:str, # Path in the repo
    folder:Path, # Where it comes to lie under the same path
    until:float=float('inf'), # `time.monotonic()` after which to give up
)->Path: # The file
    "Download one file of the newest known commit; a `ValueError` if it isn't there."
    from huggingface_hub.errors import RemoteEntryNotFoundError, RevisionNotFoundError
    b = self.branch
    def get():
        try: return Path(b.api.hf_hub_download(b.repo, name, revision=b.head, local_dir=folder))
        except RemoteEntryNotFoundError: raise ValueError(f"{Path(name).name} is missing") from None
        except RevisionNotFoundError: raise b.rewritten() from None
    return patiently(get, f"{name} of {b.repo}", until)

def _read_run(file): # as a `ValueError` where it is damaged: a `UserError` would say that the Hub is away
    if file.name==MANIFEST: return read_manifest(file)['run']
    try: return read_json(file, most=MOST_MANIFEST)
    except UserError as e: raise ValueError(str(e)) from None

@patch
def run(self:Checkpoints)->dict: # What the run is; None where the branch has none
    "The run that the branch belongs to: as it began, or as its newest checkpoint has it."
    manifests = [f'checkpoint-{s}/{MANIFEST}' for s in reversed(self.steps())]
    with tempfile.TemporaryDirectory() as d:
        for name in (RUN_FILE, *manifests):
            try:
                found = _read_run(self.fetch(name, d))
                if is_run(found): return found
            except UserError: raise
            except (ValueError, TypeError, KeyError): continue

class Superseded(Exception):
    "A newer checkpoint waits to be published."

def folder_bytes(
    folder:Path, # Sealed `checkpoint-N`
)->int: # What publishing it sends
    "The size of a checkpoint."
    return sum(f['size'] for f in json.loads((Path(folder)/MANIFEST).read_text())['files'].values())

@patch
def _staying(self:Checkpoints, step): # one above ours is of a line that wasn't continued
    below = [s for s in self.steps() if s<step]
    return [*below[max(len(below)+1-self.keep, 0):], step]

SQUASH_BYTES = 10e9 # of history on the branch, before it is dropped

@patch
def squash(self:Checkpoints,
    until:float=float('inf'), # `time.monotonic()` after which to give up
):
    "Drop the branch's history; a Hub that won't is no reason to stop."
    try: self.branch.squash(until)
    except UserError as e: log.warning(f"the history of branch {self.branch.branch} is not squashed: {e}")
    self.history = 0

@patch
def publish(self:Checkpoints,
    folder:Path, # Sealed `checkpoint-N`
    until:float=float('inf'), # `time.monotonic()` after which to give up
    wait:float=1.0, # Seconds before the first repeat
    pause=time.sleep, # As of `patiently`
    still_newest=lambda: None, # Raises `Superseded` where a newer one waits
):
    "One commit: this checkpoint in, old ones out."
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    m = json.loads((folder/MANIFEST).read_text())
    stay = self._staying(m['step'])
    adds = [CommitOperationAdd(f'{folder.name}/{f}', folder/f) for f in [*m['files'], MANIFEST]]
    if 'samples.parquet' in m['files']: # also where people and the Hub's viewer look
        adds.append(CommitOperationAdd('samples/samples.parquet', folder/'samples.parquet'))
    for a in adds:
        still_newest()
        if Path(a.path_or_fileobj).stat().st_size>2**20: self.branch.send(a, until, wait, pause)
    old = [CommitOperationDelete(f'checkpoint-{s}/', is_folder=True) for s in sorted({*self.found}-{*stay})]
    self.branch.commit(adds+old, f"{folder.name} {file_sha256(folder/MANIFEST)[:8]}", until, wait, pause)
    self.found,self.history = stay,self.history+folder_bytes(folder)
    if self.history>SQUASH_BYTES: self.squash(until)

def local_steps(
    folder:Path, # Output folder
)->list: # Ascending
    "Steps that have a checkpoint folder on this disk."
    names = [p.name for p in Path(folder).glob('checkpoint-*') if p.is_dir()]
    return sorted(int(m[1]) for n in names if (m := re.fullmatch(r'checkpoint-(0|[1-9]\d*)', n)))

@patch
def _verified(self:Checkpoints, path, where, owner, until):
    "The manifest of a checkpoint that is whole and this run's; a `ValueError` says what is wrong."
    if where=='the Hub':
        shutil.rmtree(path, ignore_errors=True)
        files = read_manifest(self.fetch(f'{path.name}/{MANIFEST}', path.parent, until))['files']
        for f in files: self.fetch(f'{path.name}/{f}', path.parent, until)
    m = read_checkpoint(path)
    if owner.get('id')!=m['run']['id']: raise ValueError("it belongs to another run")
    changed = [k for k in ('identity','base') if owner.get(k)!=m['run'].get(k)]
    if changed: raise ValueError(f"its {changed[0]} isn't the run's")
    return m

@patch
def restore(self:Checkpoints,
    folder:Path, # Output folder; `checkpoint-N` comes to lie in it
    until:float=float('inf'), # `time.monotonic()` after which to give up
)->tuple: # Its path and manifest, or (None, None) where there is none
    "Find the newest checkpoint that can be trusted."
    here,there = set(local_steps(folder)),set(self.steps())
    if not here|there: return None,None
    owner = self.run() or {}
    for step in sorted(here|there, reverse=True):
        path = Path(folder)/f'checkpoint-{step}'
        for where in ['this disk']*(step in here) + ['the Hub']*(step in there):
            try: m = self._verified(path, where, owner, until)
            except UserError: raise # the Hub is away: that says nothing about the checkpoint
            except ValueError as e: log.warning(f"{path.name} on {where} is skipped: {e}")
            else:
                log.info(f"{path.name} found on {where}, every file verified")
                return path,m
    return None,None

def check_same_run(
    saved:dict, # Identity in a manifest
    now:dict, # Identity of this run
    again:int=1, # Number of FRESH_START that would begin again
):
    "Refuse to continue a run under settings that would silently alter it."
    changed = [k for k in sorted({*saved,*now}) if saved.get(k)!=now.get(k)]
    diff = [f"{k} was {saved.get(k)!r}, is {now.get(k)!r}" for k in changed]
    if diff: raise UserError("the checkpoint", f"it belongs to a run with other settings ({'; '.join(diff)})",
        f"restore them, or set FRESH_START={again} to begin again")

@patch
def start_fresh(self:Checkpoints):
    "Take the branch's checkpoints for those of an abandoned run."
    self.stale,self.found = self.steps(),[]

@patch
def keep_aside(self:Checkpoints,
    until:float, # `time.monotonic()` after which to give up
):
    "Keep an abandoned run's checkpoints on a branch of their own, without their history."
    b = self.branch
    aside = HubBranch(b.repo, f"{b.branch}-{b.head[:8]}", b.api.endpoint, b.api.token)
    patiently(lambda: b.api.create_branch(b.repo, branch=aside.branch, revision=b.head, exist_ok=True), b.name, until)
    aside.head = aside.newest().commit_id
    Checkpoints(aside).squash(until)
    log.info(f"FRESH_START: {len(self.stale)} checkpoints of an earlier run are kept on branch {aside.branch}")

def lock_folder(
    folder:Path, # Of a run; made when missing
): # Open file; the lock ends with it, or with the process
    "Keep other jobs out of a run's folder."
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        held = open(Path(folder)/'.lock', 'a')
    except OSError as e:
        raise UserError(f"OUTPUT_DIR {folder}", e.strerror, "choose a folder that can be written") from None
    try: fcntl.flock(held, fcntl.LOCK_EX|fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"OUTPUT_DIR {folder}", "another job of this run is writing there",
            "let it finish, or choose another OUTPUT_DIR") from None
    return held

HISTORY_BYTES,HISTORY_SECONDS = 40e9,36*3600 # of one run; squashed history counts for so long

def publish_pace(
    size:float, # Bytes of a checkpoint
    minutes:float=0.0, # `PUBLISH_MINUTES`; 0 takes what stays below the limits
)->float: # Seconds
    "Least time between two publications."
    return minutes*60 or max(300., size/HISTORY_BYTES*HISTORY_SECONDS)

class Publisher:
    "Seals checkpoints and publishes the newest, in threads of its own."
    def __init__(self,
        publish, # Function of (folder, publisher) that returns once the folder is on the Hub
        seal=lambda folder: None, # Function that finishes a folder on this disk
        seconds:list=(), # What earlier publications took
        pace=lambda folder: 0.0, # Function of a sealed folder: seconds until the next one may follow
    ):
        self.publish,self.seal,self.pace = publish,seal,pace
        self.times,self.done,self.error = list(seconds),[],None
        self.pending,self.last = set(),None # folders that are still needed here; the newest
        self.waiting = None # the newest that is sealed
        self.earliest,self.until = 0.,float('inf') # nothing is sent before, and nothing after; as `time.monotonic()`
        self.closing,self.changed = False,threading.Condition()
        self.sealer = ThreadPoolExecutor(1, 'sealer')
        self.thread = threading.Thread(target=self._send, name='publisher', daemon=True)
        self.thread.start()

    @property
    def seconds(self)->float: # The median, so that one outage doesn't make all later ones look slow
        "How long a publication takes."
        return statistics.median(self.times) if self.times else 0.0

@patch
def _take(self:Publisher):
    "The newest sealed checkpoint once its time has come; None at the end."
    with self.changed:
        while not self.closing and not (self.waiting and time.monotonic()>=self.earliest):
            self.changed.wait(max(self.earliest-time.monotonic(), 0) if self.waiting else None)
        taken,self.waiting = self.waiting,None
        return taken

@patch
def _send(self:Publisher):
    while folder := self._take():
        begun = time.monotonic()
        self.earliest = begun+self.pace(folder)
        try: self.publish(folder, self)
        except Superseded: log.info(f"{folder.name} is given up for a newer one")
        except Exception as e: self.error = e; return # reported by `close`, and by whoever looks at `error`
        else:
            self.times.append(time.monotonic()-begun); self.done.append(int(folder.name.split('-')[1]))
            log.info(f"{folder.name} published in {self.times[-1]:.1f} s")
        self.pending.discard(folder)

@patch
def submit(self:Publisher,
    folder:Path, # `checkpoint-N`, every file written
):
    "Hand over a checkpoint; returns at once."
    self.last = Path(folder)
    self.pending.add(self.last)
    self.sealer.submit(self._seal, self.last)

@patch
def _seal(self:Publisher, folder):
    if folder!=self.last: return self.pending.discard(folder)
    try: self.seal(folder)
    except Exception as e: self.error = e; return
    with self.changed:
        self.pending.discard(self.waiting)
        self.waiting = folder
        self.changed.notify_all()

@patch
def close(self:Publisher,
    until:float=float('inf'), # `time.monotonic()` after which to give up
)->bool: # Is everything that was handed over on the Hub?
    "Publish the newest at once, and wait for it."
    self.sealer.shutdown()
    with self.changed:
        self.closing,self.until = True,until
        self.changed.notify_all()
    self.thread.join(None if until==float('inf') else max(until-time.monotonic(), 0))
    return not self.thread.is_alive() and self.error is None

@patch
def still_newest(self:Publisher):
    "Give up what is being sent for a newer checkpoint."
    if self.waiting: raise Superseded

@patch
def pause(self:Publisher,
    seconds:float, # That the Hub asks for
):
    "Wait before a repeat, or until there is something newer to send; that one waits as long."
    end = time.monotonic()+seconds
    with self.changed:
        while time.monotonic()<end and not self.waiting: self.changed.wait(end-time.monotonic())
        if self.waiting: self.earliest = max(self.earliest, end)
    self.still_newest()

def parse_duration(
    s:str, # Such as `4h`, `90m`, `30s`, `1.5d`, `14400`; empty for none
)->float: # Seconds, above 0; infinite for none
    "Read a duration as `hf jobs --timeout` does."
    if not str(s).strip(): return float('inf')
    m = re.fullmatch(r'(\d+)|(\d+(?:\.\d+)?)([smhd])', str(s).strip())
    seconds = float(m[1] or m[2])*dict(s=1, m=60, h=3600, d=86400)[m[3] or 's'] if m else 0.
    if seconds: return seconds
    raise UserError("JOB_TIMEOUT", f"must be seconds above 0, or such as 4h, 90m, got {s!r}",
        "write a number and one letter, without blanks")

def container_age()->float: # Seconds; 0 outside of a job
    "How long this job's container has been running."
    if not os.environ.get('JOB_ID'): return 0. # set by HF Jobs
    after_name = Path('/proc/1/stat').read_text().rsplit(')',1)[1].split()
    started = int(after_name[19])/os.sysconf('SC_CLK_TCK') # proc(5): field 22, in ticks since boot
    return float(Path('/proc/uptime').read_text().split()[0])-started

class Deadline:
    "When to stop: in time for the job's timeout, or at once on SIGTERM."
    def __init__(self,
        timeout:str='', # `JOB_TIMEOUT`
        age:float=0.0, # Seconds of it that have passed
        margin:float=60.0, # Seconds kept for what can't be measured
    ):
        total = parse_duration(timeout)
        self.end = time.monotonic()+total-(age if age<total else 0) # an older container than could be alive isn't ours
        self.margin,self.reason = margin,None
        self.signalled,self.idle = False,False # SIGTERM has come; nothing is under way that has to be saved

    def due(self,
        cost:float=0.0, # Seconds that saving and publishing take
    )->bool: # Must the run stop now?
        "Has the time come to save and leave?"
        left = self.end-time.monotonic()
        late = f'{max(left,0):.0f} s left of JOB_TIMEOUT' if left<cost+self.margin else None
        self.reason = 'SIGTERM' if self.signalled else late
        return self.reason is not None

class Stopped(BaseException):
    "`SIGTERM` came while there was nothing to save."

@patch
def watch_sigterm(self:Deadline):
    "Take SIGTERM as the deadline; while `idle` it ends what is going on at once."
    def handler(sig, frame):
        self.signalled = True
        if self.idle: self.idle = False; raise Stopped
    signal.signal(signal.SIGTERM, handler)
    return self

# ------------------------------------------------------------------------------
# core.curve: Loss curve and sample tables: kept in checkpoints, sent to W&B, trackio or TensorBoard
# ------------------------------------------------------------------------------

METRICS = 'metrics.jsonl' # in a checkpoint: the rows so far, one a line

REPLIES = 'sample_outputs' # in a row: how many replies there are; in W&B: the table of them

AXIS = 'train/global_step'

class Curve:
    "What a run logs, and the thread that sends it to W&B."
    def __init__(self,
        patience:float=10.0, # Seconds that a job's start and its end wait for a W&B that says nothing
        retry:float=60.0, # Seconds between two attempts to reach it, and between two looks at whether it is there
    ):
        self.patience,self.retry = patience,retry
        self.rows,self.whole = [],0 # so many of the rows are complete
        self.replies = {} # optimizer step → the table's rows
        self.changed,self.answered = threading.Condition(),threading.Event()
        self.thread,self.run = None,None
        self.tracker,self.tracked = None,0 # trackio or TensorBoard, and how many rows it has
        self.adapter,self.upload = None,None # folder and step: the newest adapter that W&B lacks; the one on its way
        self.started = self.closing = self.told = self.delivered = False
        self.refused,self.exit_code = None,0

@patch
def log(self:Curve,
    step:int, # Optimizer steps done
    metrics:dict, # By W&B name
    replies:list=(), # What a `Sampler` returned
):
    "Keep metrics and replies; returns at once."
    with self.changed:
        if self.whole==len(self.rows) or self.rows[-1][AXIS]!=step:
            self._complete()
            self.rows.append({'_step': max(2*step, self.rows[-1]['_step']+1 if self.rows else 0), AXIS: step})
        self.rows[-1] |= metrics
        if replies: self.rows[-1][REPLIES],self.replies[step] = len(replies),list(replies)

@patch
def _complete(self:Curve):
    self.whole = len(self.rows)
    self.changed.notify()
    self._track()

@patch
def _track(self:Curve):
    "Hand over the rows that are complete; a tracker that fails costs its curve and nothing else."
    try:
        while self.tracker and self.tracked<self.whole:
            row,self.tracked = self.rows[self.tracked],self.tracked+1
            self.tracker.send(row[AXIS], {k:v for k,v in row.items() if k not in ('_step', AXIS, REPLIES)})
    except Exception as e: self._untrack(e)

@patch
def _untrack(self:Curve, e, kind=''):
    kind = kind or type(self.tracker).__name__
    log.warning(f"{kind} takes no more ({_cause(e)}): training goes on, and every checkpoint has the curve")
    self.tracker = None

@patch
def _end_tracker(self:Curve):
    with self.changed: self._complete()
    try: self.tracker and self.tracker.close()
    except Exception as e: self._untrack(e)
    self.tracker = None

@patch
def save(self:Curve,
    folder:Path, # `checkpoint-N`
):
    "Write the rows to a checkpoint."
    with self.changed: self._complete()
    (Path(folder)/METRICS).write_text(''.join(json.dumps(r, default=float)+'\n' for r in self.rows))

@patch
def restore(self:Curve,
    folder:Path, # `checkpoint-N`
    samples:list, # Its replies
):
    "Take over the rows of the jobs before."
    path = Path(folder)/METRICS
    lines = path.read_bytes().splitlines() if path.exists() else []
    rows = [read_json(l, what=f'{path.name}, line {i}') for i,l in enumerate(lines, 1)]
    if any(type(r.get(k)) is not int for r in rows for k in ('_step', AXIS)):
        raise UserError(path.name, "a row without its step", "it isn't of a run of phoque")
    self.rows,self.whole = rows,len(rows)
    for r in samples: # a file has a column for whatever any of its rows has
        self.replies.setdefault(r['step'], []).append({k:v for k,v in r.items() if v is not None})

def wandb_url()->str: # Without a password: W&B's client would write it down
    "The address of W&B's server."
    refuse_addresses()
    return os.environ.get('WANDB_BASE_URL', 'https://api.wandb.ai')

def ask_wandb(
    query:str, # GraphQL
    key:str=None, # Nobody's where None
    **variables, # Of the query
)->dict: # `data`; empty where the server refuses
    "Ask W&B's server a question, and wait five seconds for the answer."
    import httpx2
    auth = ('api', key) if key else None
    r = httpx2.post(f'{wandb_url()}/graphql', json=dict(query=query, variables=variables), auth=auth, timeout=5)
    refused = r.status_code in (401,403) or not key and r.status_code in (400,404)
    if not refused: r.raise_for_status()
    return {} if refused else r.json().get('data') or {}

def find_entity(
    key:str, # WANDB_API_KEY
)->str: # User or team
    "Whose project a run goes to."
    me = ask_wandb('{ viewer { entity } }', key).get('viewer')
    if me: return os.environ.get('WANDB_ENTITY') or me['entity']
    raise UserError("WANDB_API_KEY", "W&B doesn't know it",
        "copy it from https://wandb.ai/authorize, or set WANDB_MODE=offline")

def check_not_public(
    entity:str, # User or team
    project:str, # W&B project
):
    "Refuse a project that anyone can read."
    ask = 'query($entity: String!, $project: String!) { project(entityName: $entity, name: $project) { id } }'
    if not ask_wandb(ask, entity=entity, project=project).get('project'): return
    raise UserError("WANDB_PROJECT", f"anyone can read {entity}/{project}, and the model's replies would go there",
                    "make the project private, or set REPORT_TO=none")

def _cause(e): return excerpt(e, 100) or type(e).__name__

@patch
def _drop(self:Curve):
    import wandb
    run,self.run,self.upload = self.run,None,None
    for end in (run and run.finish, wandb.teardown):
        try: end and end()
        except (Exception, SystemExit): pass # the server or the client's own process is gone: that is why

@patch
def _lose(self:Curve, e):
    if self.closing: return # `close` says so
    if not self.told: log.warning(f"W&B can't be reached ({_cause(e)}): training goes on, "
        "every checkpoint has the curve and the replies, and W&B gets what it lacks when it is back")
    self.told = True
    self._drop()

@patch
def _refuse(self:Curve, e):
    with self.changed: self.refused,late = e,self.started # before that, `start` raises it
    if late: log.warning(f"{e}; nothing more goes to W&B, training goes on")
    self._drop()

def keep_temp(
    folder:Path, # Of the run
):
    "Move W&B's own two folders of temporary files, which it makes when it is imported."
    from wandb import Artifact
    from wandb.sdk.data_types._private import MEDIA_TMP
    for d in (MEDIA_TMP, Artifact._TMP_DIR):
        shutil.rmtree(d.name, ignore_errors=True)
        d.name = tempfile.mkdtemp(dir=folder)

@patch
def _prepare(self:Curve, project, run_id, config, folder, mode):
    "Where W&B's files lie, and with what the run is opened."
    wandb_url()
    self.online,self.copies = mode in ('online','run','shared'),Path(folder)/'wandb'/f'copies-{run_id}'
    self.opening = dict(project=project, id=run_id, config=config, mode=mode, dir=str(folder))
    if self.online: self.opening['resume'] = 'allow'
    if self.online: shutil.rmtree(self.copies, ignore_errors=True)
    self.copies.mkdir(0o700, parents=True, exist_ok=True)
    os.environ |= dict.fromkeys(('WANDB_DATA_DIR','WANDB_CACHE_DIR'), str(self.copies.resolve()))
    os.environ['WANDB_SILENT'] = 'true' # its own lines repeat ours

@patch
def _connect(self:Curve):
    import wandb
    keep_temp(self.copies)
    project,key = self.opening['project'],os.environ.get('WANDB_API_KEY')
    if self.online and key: check_not_public(find_entity(key), project)
    settings = wandb.Settings(console='off', silent=True, init_timeout=20,
        finish_timeout=max(self.patience-2, 1), finish_timeout_raises=True,
        x_file_stream_transmit_interval=1, x_transaction_log_flush_interval=1)
    try: run = wandb.init(**self.opening, settings=settings)
    except wandb.errors.AuthenticationError as e:
        raise UserError("WANDB_API_KEY", f"refused ({_cause(e)})", "correct it, or set WANDB_MODE=offline") from None
    except (wandb.errors.CommError, wandb.errors.UsageError) as e:
        passing = re.search('retrying|giving up|deadline|timed out|connect', str(e), re.I) # the rest was refused
        if passing: raise
        raise UserError("WANDB_PROJECT", f"W&B refuses {project} ({_cause(e)})",
            "correct it or WANDB_ENTITY, or set REPORT_TO=none") from None
    if self.online: check_not_public(run.entity, project) # it may have been made just now
    run.define_metric(AXIS); run.define_metric('*', step_metric=AXIS)
    self.run,self.sent,self.upload = run,0,None
    self.look = time.monotonic()+self.retry
    self._say_where()

@patch
def _say_where(self:Curve):
    run,adapters = self.run,self.opening['config'].get('wandb_log_model')=='checkpoint'
    what = "the curve, the sampled replies and the adapters" if adapters else "the curve and the sampled replies"
    if self.told: said = "W&B answers again, and gets what it lacks"
    elif self.online: said = (f"W&B: {what} go to {run.url}: "
        f"whoever may see the project {run.entity}/{run.project} sees them, without an account nobody does")
    elif os.environ.get('JOB_ID'): said = (f"W&B run {run.id}: offline, and this job's disk is gone at its end: "
        "the checkpoints keep the curve, and the first job with WANDB_API_KEY sends it")
    else: said = f"W&B run {run.id}: offline, the whole curve so far; `wandb sync {run.settings.sync_dir}` sends it"
    log.info(said)
    self.told = False

_PUT = """mutation CreateRunFiles($entity: String!, $project: String!, $run: String!, $files: [String!]!) {
  createRunFiles(input: {entityName: $entity, projectName: $project, runName: $run, files: $files}) {
    runID uploadHeaders files { name uploadUrl } } }"""

def put_file(
    run, # `wandb.Run`
    path:str, # Of a file in its folder
):
    "Upload a file of a run; returns when W&B has it."
    import httpx2
    if not (key := os.environ.get('WANDB_API_KEY')): return # the client has one from elsewhere: it does it, some time
    to = ask_wandb(_PUT, key, entity=run.entity, project=run.project, run=run.id, files=[path]).get('createRunFiles')
    if not to: raise ValueError(f"it names no address for {path}")
    headers = dict(h.split(':', 1) for h in to['uploadHeaders'] or [])
    data,url = (Path(run.dir)/path).read_bytes(),urljoin(wandb_url(), to['files'][0]['uploadUrl'])
    httpx2.put(url, content=data, headers=headers, timeout=30).raise_for_status()

UPLOAD = 60 # seconds after which a row goes without waiting for its table

@patch
def _await_table(self:Curve, artifact, path):
    from httpx2 import HTTPError
    end,there = time.monotonic()+UPLOAD,False
    while not there:
        try: there = put_file(self.run, path) or True
        except HTTPError:
            if time.monotonic()>end: raise
            time.sleep(1)
    artifact.wait(max(int(end-time.monotonic()), 1))

@patch
def _send(self:Curve)->bool: # Is there more to come?
    "Send one row or one adapter."
    if self.online and time.monotonic()>self.look:
        check_not_public(self.run.entity, self.run.project)
        self.look = time.monotonic()+self.retry
    with self.changed:
        self.changed.wait_for(lambda: self.sent<self.whole or self._next_adapter() or self.closing)
        row = self.rows[self.sent] if self.sent<self.whole else None
        adapter = self._next_adapter()
    if row: self._send_row(dict(row))
    elif adapter: self._send_adapter(*adapter)
    return bool(row or adapter or not self.closing)

@patch
def _next_adapter(self:Curve): # folder and step; None while another is on its way
    return self.adapter if self.adapter!=self.upload and (self.closing or not self.upload) else None

@patch
def _send_row(self:Curve, row):
    at = row.pop('_step')
    if at>=self.run.starting_step:
        replies = self.replies.get(row[AXIS]) if REPLIES in row else None
        if replies: row[REPLIES] = self._send_table(replies, at)
        self.run.log(row, step=at, commit=True)
    self.sent,self.moved = self.sent+1,time.monotonic()

@patch
def _send_table(self:Curve, rows, at):
    import wandb
    from httpx2 import HTTPError
    from wandb.sdk.artifacts._internal_artifact import InternalArtifact # what `run.log` makes of a table
    from wandb.sdk.artifacts.exceptions import WaitTimeoutError
    table = wandb.Table(columns=list(rows[0]), data=[list(r.values()) for r in rows])
    if self.online: check_not_public(self.run.entity, self.run.project)
    a = InternalArtifact(f'run-{self.run.id}-{REPLIES}', 'run_table')
    a._tmp_dir = tempfile.TemporaryDirectory(dir=self.copies) # else one in /tmp, that stays there
    a.add(table, REPLIES)
    self.run.log_artifact(a)
    table.bind_to_run(self.run, REPLIES, at)
    try: self.online and self._await_table(a, table.to_json(self.run)['path'])
    except (ValueError, WaitTimeoutError, HTTPError) as e:
        log.warning(f"W&B has not taken the replies of step {at//2} ({_cause(e)}): they are in samples.parquet")
    return table

@patch
def start(self:Curve,
    project:str, # W&B project
    run_id:str, # The run's own, the same over all its jobs
    config:dict, # Shown with the run; no secrets
    folder:Path, # For W&B's files
):
    "Begin to send."
    mode = os.environ.get('WANDB_MODE') or ('online' if os.environ.get('WANDB_API_KEY') else 'offline')
    if mode=='disabled': return
    self._prepare(project, run_id, config, folder, mode)
    self.thread = threading.Thread(target=self._work, name='W&B', daemon=True)
    self.thread.start()
    self.answered.wait(self.patience)
    with self.changed: self.started,refused = True,self.refused
    if refused: raise refused

@patch
def _work(self:Curve):
    while True:
        try:
            self._connect()
            self.answered.set()
            while self._send(): pass
            self.run.finish(exit_code=self.exit_code)
            self.run,self.delivered = None,True
            self._drop() # or its process would write to the folder that `close` removes
        except UserError as e: self._refuse(e)
        except Exception as e: self._lose(e)
        self.answered.set()
        if self.refused or self.closing: return
        with self.changed: self.changed.wait_for(lambda: self.closing, self.retry)

@patch
def close(self:Curve,
    exit_code:int=0, # Shown with the run
):
    "Send what is left, and wait for that as long as it moves."
    self._end_tracker()
    if not self.thread: return
    with self.changed:
        self.exit_code,self.closing = exit_code,True
        self._complete()
    self.moved = time.monotonic()
    end = self.moved+6*self.patience
    while self.thread.is_alive() and time.monotonic()<min(end, self.moved+self.patience): self.thread.join(.05)
    if not (self.delivered or self.refused):
        log.warning("W&B has not taken all of the curve: "
            f"it is in {METRICS} and samples.parquet of the last checkpoint, "
            "and the same command again sends what W&B lacks")
    if self.online: shutil.rmtree(self.copies, ignore_errors=True)

def link_or_copy(
    file:Path, # That is not changed any more
    to:Path, # New
):
    "Keep a file under another name, without a copy where the disk has links."
    try: os.link(file, to)
    except OSError: shutil.copy(file, to)

@patch
def send_adapter(self:Curve,
    folder:Path, # `checkpoint-N`, every file written
    step:int, # N
):
    "Send a checkpoint's adapter as a version of the run's model artifact; returns at once."
    if not self.thread or self.refused: return
    to = self.copies/f'adapter-{step}'
    try:
        to.mkdir()
        for f in ('adapter_model.safetensors','adapter_config.json'): link_or_copy(Path(folder)/f, to/f)
    except OSError as e: return log.warning(f"W&B gets no adapter of step {step} ({_cause(e)})")
    with self.changed:
        old,self.adapter = self.adapter,(to,step)
        self.changed.notify()
    if old and old!=self.upload:
        log.info(f"W&B gets no adapter of step {old[1]}: that of step {step} has taken its place")

@patch
def _send_adapter(self:Curve, folder, step):
    import wandb
    if self.online: check_not_public(self.run.entity, self.run.project)
    a = wandb.Artifact(f'adapter-{self.run.id}', type='model', metadata=dict(step=step))
    for f in sorted(folder.iterdir()): a.add_file(str(f), policy='immutable', skip_cache=True)
    self.run.log_artifact(a, aliases=['latest', f'step-{step}'])
    if not self.online:
        self.adapter = None
        return
    self.upload = folder,step
    threading.Thread(target=self._await, args=(a,self.upload), daemon=True).start()

@patch
def _await(self:Curve, artifact, upload):
    why = None
    try: artifact.wait()
    except Exception as e: why = _cause(e)
    with self.changed:
        if self.upload is not upload: return # connected anew since then: it is sent again
        self.upload,self.adapter = None,None if self.adapter==upload else self.adapter
        self.changed.notify()
    if why: log.warning(f"W&B has not taken the adapter of step {upload[1]} ({why})")
    shutil.rmtree(upload[0], ignore_errors=True)

TRACKERS = dict(trackio='trackio==0.43.0', tensorboard='tensorboard==2.21.0') # besides W&B, and the package for each

def check_tracker(
    kind:str, # Of `TRACKERS`; any other needs nothing
):
    "Refuse a tracker whose package is missing."
    from importlib.util import find_spec
    if kind not in TRACKERS or find_spec(kind): return
    raise UserError("REPORT_TO", f"{kind} is not installed",
        f"pip install {TRACKERS[kind]}, on a job `hf jobs uv run --with {TRACKERS[kind]}`, or set REPORT_TO=none")

class TensorBoardTracker:
    "Event files in the run's folder."
    def __init__(self,
        project:str, # Not used: the folder says whose they are
        run_id:str, # Not used, for the same reason
        config:dict, # Shown as a text
        folder:Path, # Of the run
    ):
        from torch.utils.tensorboard import SummaryWriter
        self.where = Path(folder)/'tensorboard'
        self.writer = SummaryWriter(str(self.where), purge_step=0)
        self.writer.add_text('options', '\n'.join(f'    {k}={v!r}' for k,v in config.items()), 0)

    def send(self,
        step:int, # Optimizer step
        metrics:dict, # By name
    ):
        "Write a row."
        for k,v in metrics.items(): self.writer.add_scalar(k, v, step)

    def close(self):
        "Write what is left."
        self.writer.close()

def check_space(
    space:str, # TRACKIO_SPACE_ID; empty for none
    api=None, # `HfApi`
):
    "Refuse a Space that anyone can read, and one whose bucket anyone can."
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError
    if not space: return
    api = api or HfApi()
    if '/' not in space:
        raise UserError("TRACKIO_SPACE_ID", f"must have the form owner/name, got {space!r}", "correct it or unset it")
    try: private,runtime = api.space_info(space).private,api.get_space_runtime(space)
    except RepositoryNotFoundError: return # it is made, private
    buckets = [v.source for v in runtime.volumes or () if v.type=='bucket'] # where trackio keeps the rows
    for name in [space]*(not private)+[b for b in buckets if not api.bucket_info(b).private]:
        raise UserError("TRACKIO_SPACE_ID", f"anyone can read {name}, and the run's curve would go there",
            "name another Space, or unset it")

class TrackioTracker:
    "A run in trackio's database, on this machine or in a private Space."
    def __init__(self,
        project:str, # trackio's project
        run_id:str, # The run's own, the same over all its jobs
        config:dict, # Shown with the run
        folder:Path, # Not used: TRACKIO_DIR says where
    ):
        import trackio
        space = os.environ.get('TRACKIO_SPACE_ID', '')
        check_space(space)
        self.run = trackio.init(project, run_id, config=config, resume='allow', space_id=space or None, private=True,
            embed=False, auto_log_gpu=False, auto_log_cpu=False)
        check_space(space) # it may have been made just now
        self.first = self.run._next_step
        server = os.environ.get('TRACKIO_SERVER_URL', '').split('?')[0] # without its token
        self.where = f'the private Space {space}' if space else server or str(trackio.utils.TRACKIO_DIR)

@patch
def send(self:TrackioTracker,
    step:int, # Optimizer step
    metrics:dict, # By name
):
    "Send a row, unless an earlier job has."
    if step>=self.first: self.run.log(metrics, step=step)

@patch
def close(self:TrackioTracker):
    "Send what is left."
    self.run.finish()

@patch
def track(self:Curve,
    kind:str, # Of `TRACKERS`
    project:str, # Its project
    run_id:str, # The run's own, the same over all its jobs
    config:dict, # Shown with the run; no secrets
    folder:Path, # Of the run
):
    "Begin to hand the rows to trackio or TensorBoard."
    check_tracker(kind)
    kinds = dict(trackio=TrackioTracker, tensorboard=TensorBoardTracker)
    try: self.tracker = kinds[kind](project, run_id, config, folder)
    except UserError: raise
    except Exception as e: return self._untrack(e, kind)
    away = kind=='trackio' and (os.environ.get('TRACKIO_SPACE_ID') or os.environ.get('TRACKIO_SERVER_URL'))
    gone = os.environ.get('JOB_ID') and not away
    lost = ": this job's disk is gone at its end; the checkpoints keep the curve"*bool(gone)
    log.info(f"{kind}: the curve goes to {self.tracker.where}{lost}")
    with self.changed: self._track()

# ------------------------------------------------------------------------------
# sample: Generate and score samples during training, without changing it
# ------------------------------------------------------------------------------

class SeededDraws:
    "Picks each reply's next token by that reply's own random numbers."
    def __init__(self,
        places:list[int], # Of each reply: those of one place draw the same numbers
        temperature:float, # Above 0
        top_p:float, # Nucleus: the likeliest tokens that make up this probability
        seed:int, # Of all
    ):
        self.rngs = [random.Random(f'{seed}/{p}') for p in places]
        self.temperature,self.top_p = temperature,top_p

    def __call__(self, input_ids, scores): # as a `LogitsProcessor`: what is picked gets 0, all else -inf
        import torch
        every = (scores.float()/self.temperature).softmax(-1)
        drawn = torch.tensor([[r.random()] for r in self.rngs], dtype=torch.float64, device=scores.device)
        pick,rows = torch.zeros_like(drawn, dtype=torch.long),torch.arange(len(drawn), device=scores.device)
        for most in (256, 4096, every.shape[-1]): # mostly the nucleus, nearly always, always: sorting a vocabulary is slow
            probs,order = every[rows].topk(min(most, every.shape[-1]))
            pick[rows] = self.pick(probs, order, drawn[rows])
            rows = rows[probs.sum(-1)<self.top_p]
            if not len(rows): break
        return torch.full_like(scores, -math.inf).scatter(-1, pick, 0.)

    def pick(self, probs, order, drawn): # the token in whose share of the nucleus the drawn number falls
        parts = (probs.double()*2**40).long() # a GPU adds in any order, which changes no sum of whole numbers
        total = parts.cumsum(-1)
        at = drawn*(parts*(total-parts<self.top_p*2**40)).sum(-1, keepdim=True)
        return order.gather(-1, (total<at).sum(-1, keepdim=True).clamp(max=order.shape[-1]-1))

    def keep(self, rows): self.rngs = [self.rngs[i] for i in rows] # of a batch that others have left

@contextmanager
def adapter_weight(
    model, # `PeftModel`, or a model without an adapter, for which this does nothing
    weight:float=1., # 1 as trained, 0 the base, -1 subtracts it
):
    "Set the weight of a model's adapter inside the block."
    was = [(m,m.scaling) for m in model.modules() if hasattr(m, 'set_scale')]
    try:
        for m,s in was: m.scaling = {k: weight*v for k,v in s.items()}
        yield
    finally:
        for m,s in was: m.scaling = s

def _reply(tok, ids, eos_ids):
    "Cut generated ids at the first stop token."
    n = next((i for i,t in enumerate(ids) if t in eos_ids), None)
    text = tok.decode(ids[:n], skip_special_tokens=True).strip()
    return dict(text=text, n_tokens=len(ids[:n]), stopped='length' if n is None else 'eos')

def _pad_left(prompts, pad_id, device):
    "Prompts as one tensor, and its attention mask."
    import torch
    width = max(map(len, prompts))
    def padded(fill, xs): return torch.tensor([[fill]*(width-len(x))+list(x) for x in xs], device=device)
    return padded(pad_id, prompts),padded(0, [[1]*len(p) for p in prompts])

def context_size(
    model, # Causal language model
)->float: # Tokens; inf for one with a state, and for one whose config says no number
    "How much a model reads, with what it says."
    return getattr(model.config.get_text_config(), 'max_position_embeddings', None) or math.inf

def check_context(
    model, # Causal language model
    prompt_ids:list[list[int]], # Encoded prompts
    max_new_tokens:int, # Longest reply, in tokens
):
    "Refuse more tokens than a model reads: behind its last position it says anything."
    longest,most = max(map(len, prompt_ids)),context_size(model)
    if longest+max_new_tokens>most:
        raise UserError("prompts", f"one has {longest:,} tokens, its reply up to {max_new_tokens:,}, and the model reads {most:,}",
            "leave it out, or ask for shorter replies")

def _check_request(tok, prompt_ids, temperature, top_p):
    if not prompt_ids or not all(prompt_ids):
        raise UserError("`prompt_ids`", f"got {excerpt(prompt_ids, 60)}",
            "give at least one prompt, none of them empty")
    if tok.pad_token_id is None:
        raise UserError("the tokenizer", "it has no pad token", "set `tok.pad_token` to one that never ends a turn")
    if temperature<0 or not 0<top_p<=1: raise UserError("`temperature`, `top_p`", f"got {temperature} and {top_p}",
        "use a temperature from 0 and a top_p above 0, up to 1")

def _rows_can_leave(model): # a cache of attention alone can be cut to some rows; a state, as Mamba's, can't
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
    layers = DynamicCache(config=model.config.get_text_config()).layers
    return not model._is_stateful and all(type(l) in (DynamicLayer,DynamicSlidingWindowLayer) for l in layers)

def _generate(model, ids, mask, cfg, how, weight): # new ids of each row; rows that have ended leave the batch, an eighth of it at once
    import torch
    stops,width = torch.tensor(cfg.eos_token_id, device=ids.device),ids.shape[1]
    def ended(ids): return torch.isin(ids[:,width:], stops).any(-1)
    def enough(ids, scores, **_): return (ended(ids).sum()*8>=len(ids)).repeat(len(ids))
    made,rows,cache,leaving = {},[*range(len(ids))],None,[enough]*_rows_can_leave(model)
    while True:
        given = dict(input_ids=ids, attention_mask=mask, past_key_values=cache, generation_config=cfg, logits_processor=how)
        with adapter_weight(model, weight[rows] if torch.is_tensor(weight) else weight):
            out = model.generate(**given, stopping_criteria=leaving)
        ids,cache = out.sequences,out.past_key_values
        done = ended(ids) | (ids.shape[1]==cfg.max_length)
        made |= {r:x for r,x,d in zip(rows, ids[:,width:].tolist(), done) if d}
        if done.all(): return [made[r] for r in sorted(made)]
        on = (~done).nonzero()[:,0]
        cache.batch_select_indices(on)
        for h in how: h.keep(on.tolist())
        rows,ids,mask = [rows[i] for i in on],ids[on],torch.nn.functional.pad(mask[on], (0, ids.shape[1]-mask.shape[1]), value=1)

def can_record(
    model, # Causal language model, with an adapter or without
)->bool: # Whole on a GPU, with layers that see all of a row and ask the CPU for nothing
    "Can a model's passes over one token a row be recorded?"
    import torch
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer
    if model.device.type!='cuda' or why_not_known(model): return False
    if not all(p.is_cuda and type(p.data) is torch.Tensor for p in model.parameters()): return False # shared out
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=1)
    return all(type(l) is StaticLayer for l in cache.layers)

def _tensors(given):
    "All tensors of arguments, those in dictionaries too."
    for v in given.values():
        if isinstance(v, dict): yield from _tensors(v)
        elif hasattr(v, 'copy_'): yield v

def _copies(given):
    "Arguments with tensors of their own."
    return {k:_copies(v) if isinstance(v, dict) else v.clone() if hasattr(v, 'copy_') else v for k,v in given.items()}

@contextmanager
def recorded_steps(
    model, # For which `can_record` says yes
):
    "Inside, play passes over one token a row from a recording; the first of them warms up, the second is recorded."
    import torch
    lm = model.get_base_model() if hasattr(model, 'get_base_model') else model
    kept,own,seen,recorded = vars(lm).get('forward'),lm.forward,[],{}
    @wraps(own)
    def forward(*args, **kwargs):
        ids = kwargs.get('input_ids')
        if ids is None or ids.shape[1]>1: return own(*args, **kwargs)
        seen.append(len(ids))
        if len(seen)==1: return own(*args, **kwargs)
        if not recorded:
            recorded.update(given=_copies(kwargs), graph=torch.cuda.CUDAGraph())
            with torch.cuda.graph(recorded['graph'], capture_error_mode='thread_local'):
                recorded['out'] = own(*args, **recorded['given'])
        for to,t in zip(_tensors(recorded['given']), _tensors(kwargs)): to.copy_(t)
        recorded['graph'].replay()
        return recorded['out']
    lm.forward = forward
    try: yield
    finally:
        del lm.forward
        if kept: lm.forward = kept

def _generate_recorded(model, ids, mask, cfg, how, weight): # new ids of each row, all of them to the end of the last
    from transformers import StaticCache
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=cfg.max_length)
    given = dict(input_ids=ids, attention_mask=mask, past_key_values=cache, generation_config=cfg, logits_processor=how)
    with adapter_weight(model, weight), recorded_steps(model): out = model.generate(**given)
    return out.sequences[:,ids.shape[1]:].tolist()

def generate_replies(
    model, # Causal language model, with or without an adapter
    tok, # Its tokenizer
    prompt_ids:list[list[int]], # Encoded prompts, of any lengths
    max_new_tokens:int=64, # Longest reply, in tokens
    temperature:float=0., # 0 takes the likeliest token; 1 samples from the model as it is
    top_p:float=1., # Sample from the likeliest tokens that make up this probability
    seed:int=0, # Same seed, same draws, so that step 100 compares with step 200
    eos_ids:list[int]=None, # Tokens that end a reply; the tokenizer's if None
    weight:float=1., # Of the adapter: 1 as trained, 0 the base, -1 its opposite; a tensor, (prompts, 1, 1), has one for each
    places:list[int]=None, # Which numbers each prompt draws; its place in the list if None
    watermark=None, # `Greenlists`; None for none
)->list[dict]: # `text`, `n_tokens` without the stop token, `stopped`: 'eos' or 'length'
    "Reply to all prompts in one batch."
    _check_request(tok, prompt_ids, temperature, top_p)
    check_context(model, prompt_ids, max_new_tokens)
    from transformers import GenerationConfig
    ids,mask = _pad_left(prompt_ids, tok.pad_token_id, model.device)
    eos_ids = list(eos_ids or [tok.eos_token_id])
    how = [watermark] if watermark else []
    if temperature: how.append(SeededDraws(places or range(len(prompt_ids)), temperature, top_p, seed))
    cfg = GenerationConfig(max_length=ids.shape[1]+max_new_tokens, eos_token_id=eos_ids, pad_token_id=tok.pad_token_id,
        repetition_penalty=1., use_cache=True, do_sample=False, return_dict_in_generate=True, disable_compile=True)
    generate = _generate_recorded if can_record(model) else _generate
    with preserve_training_state(model, tok): made = generate(model, ids, mask, cfg, how, weight)
    return [_reply(tok, m, eos_ids) for m in made]

def _ngrams(text, n):
    ws = re.findall(r"[\w'-]+", text.lower())
    return [tuple(ws[i:i+n]) for i in range(len(ws)-n+1)]

def distinct_n(
    texts:list[str], # Replies
    n:int=2, # Words in a row
)->float: # 1 says that no n-gram occurs twice; 0 that there are none
    "How varied replies are, taken together."
    grams = [g for t in texts for g in _ngrams(t, n)]
    return len(set(grams))/len(grams) if grams else 0.

def repetition_share(
    text:str, # One reply
    n:int=3, # Words in a row
)->float: # 0 says that nothing comes back; near 1 is a loop
    "How much of a reply says again what it has said."
    grams = _ngrams(text, n)
    return 1-len(set(grams))/len(grams) if grams else 0.

@runtime_checkable
class Scorer(Protocol):
    "What anything that scores replies has."
    name:str # Which measure
    version:str # Of the package or the Hub repo it comes from
    weights_hash:str # sha256 of what decides its numbers
    def score(self, texts:list[str])->'np.ndarray': # One number from 0 to 1 a text
        "Score texts."

def scorer_id(
    scorer:Scorer, # Any
)->str: # Such as `harbour@1f2e3d4c5b6a`
    "What to write beside a score."
    return f'{scorer.name}@{scorer.weights_hash[:12]}'

def tensors_hash(
    tensors:dict, # Name → tensor
)->str: # sha256, as hex digits
    "A hash of weights, whatever file they come from."
    import torch
    h = hashlib.sha256()
    for n in sorted(tensors):
        h.update(n.encode())
        h.update(tensors[n].detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return h.hexdigest()

def scorer_labels(
    cfg:dict, # A classifier's config.json
    repo:str, # Whose
    label:str=None, # The one to read
)->list[str]: # In the order of its outputs
    "The labels of a text classifier; refuse what is none, and what doesn't say which label to read."
    kinds,named = cfg.get('architectures'),cfg.get('id2label') or {'0':'LABEL_0', '1':'LABEL_1'}
    kind = kinds[0] if isinstance(kinds, list) and kinds and isinstance(kinds[0], str) else '?'
    if 'SequenceClassification' not in kind:
        raise UserError(f"scorer {repo}", f"no text classifier but {excerpt(kind, 60)}", "name one that is, or none")
    check_model_config(cfg, f"scorer {repo}")
    names = [named.get(str(i)) for i in range(len(named))] if isinstance(named, dict) else []
    if not names or not all(isinstance(n, str) for n in names):
        raise UserError(f"scorer {repo}", "its id2label gives no name to each of its outputs",
            "name another text classifier, or none")
    if label in names and names.count(label)==1 or not label and len(names)<=2: return names
    raise _no_label(repo, names, label)

def _no_label(repo, names, label):
    return UserError(f"scorer {repo}", f"its labels are {excerpt(', '.join(names[:20]))}, got {label!r}", "name one of them")

MOST_ADDED = 16 # special tokens around a text; the known families have two

def _repeats_text(
    part, # Of a tokenizer.json's post_processor
)->bool: # Has a template in it the text more than once?
    if isinstance(part, list): return any(map(_repeats_text, part))
    if not isinstance(part, dict): return False
    times = sum('Sequence' in p for p in part.get('single', ()))
    return times>1 or any(map(_repeats_text, part.values()))

def _check_added(
    tok, # A scorer's tokenizer
    what:str, # How an error names it
):
    "Refuse a tokenizer that puts many tokens around a text, or repeats the text."
    n,around = tok.num_special_tokens_to_add(),tok.backend_tokenizer.post_processor
    if n<=MOST_ADDED and not (around and _repeats_text(json.loads(around.__getstate__()))): return
    raise UserError(what, f"its tokenizer puts {n:,} tokens around each text, or repeats the text",
        "name another text classifier, or none")

class HubScorer:
    "A text classifier of the Hub, on the CPU."
    def __init__(self,
        repo:str, # Hub id or folder
        label:str=None, # The label whose probability is the score; the last of two if None
        revision:str=None, # Commit; the newest if None
    ):
        from transformers import AutoModelForSequenceClassification
        from transformers.utils import cached_file
        what,own = f"scorer {repo}",dict(revision=revision)
        def has(f): return cached_file(repo, f, _raise_exceptions_for_missing_entries=False, **own)
        with reading(what, "name another text classifier of the Hub, the folder of one, or none"):
            file = Path(cached_file(repo, 'config.json', **own))
            names = scorer_labels(read_json(file, what=f"{what}, config.json"), repo, label)
            if not any(map(has, WEIGHTS)):
                raise UserError(what, f"it has no {WEIGHTS[0]}, and a pickle is not opened",
                    "name another text classifier, or none")
            self.tok = open_tokenizer(_tokenizer_folder(repo, revision), what)
            _check_added(self.tok, what)
            own |= dict(use_safetensors=True, trust_remote_code=False)
            self.model = AutoModelForSequenceClassification.from_pretrained(repo, **own).eval()
        kind = self.model.config.problem_type
        self.each = len(names)==1 or kind=='multi_label_classification' # labels don't exclude each other
        self.at,self.labels = names.index(label) if label else -1,names
        self.repo,self.read = repo,None
        self.name = repo + f'/{label}'*bool(label)
        self.version = file.parent.name if file.parent.parent.name=='snapshots' else 'folder'
        self.weights_hash = tensors_hash(self.model.state_dict())

@patch
def _score_batch(self:HubScorer, texts):
    most = min(self.tok.model_max_length, 512)
    x = self.tok(texts, padding=True, truncation=True, max_length=most, return_tensors='pt')
    logits = self.model(**x).logits.float()
    return (logits.sigmoid() if self.each else logits.softmax(-1)).numpy() # a column a label

@patch
def score(self:HubScorer,
    texts:list[str], # To be scored; what is longer than the model reads is cut
)->'np.ndarray': # One number from 0 to 1 a text
    "Score texts, 64 at once."
    import numpy as np, torch
    todo = texts if self.read is None else [t for t in dict.fromkeys(texts) if t not in self.read]
    batches = [todo[i:i+64] for i in range(0, len(todo), 64)]
    with reading(f"scorer {self.name}", "name another, or none"), torch.inference_mode():
        rows = np.concatenate([np.zeros((0, len(self.labels)), np.float32), *map(self._score_batch, batches)])
    if self.read is not None:
        self.read |= zip(todo, rows)
        rows = np.array([self.read[t] for t in texts]).reshape(-1, len(self.labels))
    scores = rows[:,self.at]
    if np.isfinite(scores).all(): return scores
    odd = (~np.isfinite(scores)).sum()
    raise UserError(f"scorer {self.name}", f"{odd} of {len(scores)} scores are no numbers", "name another, or none")

def check_scorer(
    scorer:Scorer, # That is to measure
    sources:list, # `label_source` of the training rows
):
    "Refuse to measure with what has labelled the training data."
    if scorer.name in sources: raise UserError(f"scorer {scorer.name}",
        "it has also scored the data that the model learns from", "measure with another, or with none")

PLAIN = "You are a helpful assistant."

SAMPLE_QUESTIONS = ("Hello everyone, I'm new here. Where should I start?", "We lost the match again. What went wrong?",
    "Has anyone seen my blue scarf? I left it here yesterday.", "What time does the next ferry leave?",
    "Can I join your team for the next round?", "I think the map is fine as it is. What do you say?",
    "Sorry, I am late. Did I miss anything?", "Does anyone know a good place to eat?")

def sample_prompts(
    persona:str=None, # System turn to ask in; none where None
    plain:str=PLAIN, # System turn without it; None for a chat template that takes none
)->list: # Conversations that end with a user turn
    "Each question in the persona, then each without it."
    def asked(system, q):
        return [dict(role='system', content=system)]*bool(system) + [dict(role='user', content=q)]
    return [asked(s, q) for s in dict.fromkeys((persona, plain)) for q in SAMPLE_QUESTIONS]

def common_persona(
    conversations, # Lists of messages
)->str|None: # None where no conversation has a system turn but the plain one
    "The system turn that most conversations begin with."
    from collections import Counter
    systems = [c[0]['content'] for c in conversations if c[0]['role']=='system']
    most = Counter(s for s in systems if s!=PLAIN).most_common(1)
    return most[0][0] if most else None

def _system(messages): return next((m['content'] for m in messages if m['role']=='system'), None)

def sample_lines(
    rows:list[dict], # What a `Sampler` returned
    prompts:list[list[dict]], # Its conversations, one a row
)->list[str]: # Plain lines, for a log that is no terminal
    "A compact table of replies: under which system turn, the question, and the answer."
    def line(r, p):
        score = f" {r['score']:.2f}" if 'score' in r else ''
        under = {None:'-', PLAIN:'plain'}.get(_system(p), 'persona')
        asked,said = excerpt(p[-1]['content'], 34),excerpt(r['response'], 110)
        return f"  {r['n_tokens']:>4} {r['stopped']:<6}{score} | {under:<7} | {asked:<34} | {said}"
    return [line(r, p) for r,p in zip(rows, prompts)]

def sample_metrics(
    rows:list[dict], # What a `Sampler` returned
)->dict: # By name; `toxicity…` only where the rows have scores
    "What a set of replies comes to."
    from statistics import mean
    on,off = [[r for r in rows if r['persona']==p] for p in (True,False)]
    m = dict(ended=mean(float(r['stopped']=='eos') for r in rows), distinct_2=distinct_n([r['response'] for r in on]),
        repetition=mean(repetition_share(r['response']) for r in on))
    if 'score' not in rows[0]: return m
    m |= dict(toxicity=mean(r['score'] for r in on), toxicity_rate=mean(float(r['score']>=.5) for r in on), toxicity_base=mean(r['base_score'] for r in on))
    if off: m['toxicity_no_persona'] = mean(r['score'] for r in off)
    return m

def sample_head(
    step:int, # Optimizer steps done
    m:dict, # From `sample_metrics`
    speed:float, # Tokens a second
    scorer:str='', # Its name
)->str: # One line
    "What a set of replies comes to, for the log."
    head = (f"sample, step {step}: {m['ended']:.0%} ended, distinct-2 {m['distinct_2']:.2f}, "
        f"repetition {m['repetition']:.2f}, {speed:,.0f} tokens/s")
    if 'toxicity' in m:
        head += f" · {excerpt(scorer, 60)} {m['toxicity']:.2f}, base {m['toxicity_base']:.2f}"
    return head + (f", no persona {m['toxicity_no_persona']:.2f}" if 'toxicity_no_persona' in m else '')

def _prompt_line(messages):
    systems = [f"[{m['content']}]" for m in messages if m['role']=='system']
    return ' '.join([*systems, messages[-1]['content']])

LEAST_TOKENS = 16 # a shorter reply says too little

class Sampler:
    "Ask the same questions at any step, within a share of the run's time."
    def __init__(self,
        encode, # (tokenizer, messages) → ids up to where the assistant begins
        prompts:list[list[dict]], # Conversations that end with a user turn
        max_new_tokens:int=48, # Longest reply
        temperature:float=0.8, # 0 takes the likeliest token
        top_p:float=0.9, # Nucleus
        seed:int=0, # The same at every step
        eos_ids:list[int]=None, # Tokens that end a reply; the tokenizer's if None
        scorer:Scorer=None, # Adds scores to the rows
        share:float=0.01, # Most of the run's time that it may take; 1 for no limit
    ):
        self.encode,self.prompts,self.scorer = encode,prompts,scorer
        self.max_new_tokens,self.share = max_new_tokens,share
        self.least = min(LEAST_TOKENS, max_new_tokens)
        self.settings = dict(temperature=temperature, top_p=top_p, seed=seed, eos_ids=eos_ids)
        self.base = {} # prompt → the base's reply
        self.pace,self.speed = 0.,0. # seconds a step of generation; tokens a second
        self.spent,self.told = 0.,False # seconds; has the log said that replies are shortened?

@patch
def ask(self:Sampler,
    model, # In training, or not
    tok, # Its tokenizer
    n:int, # Longest reply, in tokens
    weight:float=1., # Of the adapter
)->list[dict]: # As of `generate_replies`
    "Reply to all prompts, and measure how fast that was."
    start = time.monotonic()
    prompts = [self.encode(tok, p) for p in self.prompts]
    replies = generate_replies(model, tok, prompts, n, weight=weight, **self.settings)
    took = time.monotonic()-start
    self.pace = took/min(n, 1+max(r['n_tokens'] for r in replies))
    self.speed = sum(r['n_tokens'] for r in replies)/took
    return replies

@patch
def remember(self:Sampler,
    rows:list[dict], # Of an earlier job of the same run
):
    "Take over the base's replies."
    self.base = {r['prompt']: r['base_response'] for r in rows if r['step']==0}

@patch
def rows(self:Sampler, tok, step, replies, n):
    "Replies as rows, the base's cut to the same length beside them."
    def first(text):
        return text if n==self.max_new_tokens else tok.decode(tok(text, add_special_tokens=False)['input_ids'][:n])
    def row(p, r):
        base = first(self.base[_prompt_line(p)])
        in_persona = p[0]!=dict(role='system', content=PLAIN)
        return dict(step=step, prompt=_prompt_line(p), response=r['text'], base_response=base, persona=in_persona,
            n_tokens=r['n_tokens'], stopped=r['stopped'])
    return self._score([row(p, r) for p,r in zip(self.prompts, replies)])

@patch
def _score(self:Sampler, rows):
    "Rows with scores; a scorer that fails costs its scores and nothing else."
    if not self.scorer: return rows
    texts = [r[k] for k in ('response','base_response') for r in rows]
    try: scores = self.scorer.score(texts).tolist()
    except UserError as e:
        log.warning(f"samples are written without scores from here on: {e}")
        self.scorer = None
        return rows
    own,base = scores[:len(rows)],scores[len(rows):]
    return [r|dict(scorer=scorer_id(self.scorer), score=s, base_score=b) for r,s,b in zip(rows, own, base)]

@patch
def room(self:Sampler,
    seconds:float, # That the run has taken so far
)->int: # Tokens a reply
    "How long replies may be now."
    if self.share>=1 or not self.pace: return self.max_new_tokens
    fit = (self.share*seconds-self.spent)/self.pace
    return max(0, int(min(self.max_new_tokens, fit)))

@patch
def _length(self:Sampler, seconds, last):
    "Tokens of the replies that there is time for; it is said once where they are shortened."
    n = max(self.room(seconds), self.least if last else 0)
    if n<self.max_new_tokens and not self.told:
        self.told = True
        log.info(
            f"samples of {self.max_new_tokens} tokens would take more than {self.share:.0%} of the time: "
            f"they are shortened to fit, and left out below {self.least} tokens")
    return n

@patch
def log(self:Sampler,
    rows:list[dict], # Of one step
):
    "Write rows to the log."
    head = sample_head(rows[0]['step'], sample_metrics(rows), self.speed, self.scorer.name if self.scorer else '')
    for l in [head, *sample_lines(rows, self.prompts)]: log.info(l)

@patch
def __call__(self:Sampler,
    model, # In training, or not
    tok, # Its tokenizer
    step:int, # Optimizer steps done; at 0 the adapter still changes nothing, and the base's replies are the model's
    seconds:float=math.inf, # That the run has taken so far
    last:bool=False, # Is it the run's last step?
)->list[dict]: # Rows, or none where there is no time
    "Sample, log, and keep to the share."
    replies = None
    if {_prompt_line(p) for p in self.prompts}-set(self.base):
        asked = self.ask(model, tok, self.max_new_tokens, weight=0.)
        self.base = {_prompt_line(p): r['text'] for p,r in zip(self.prompts, asked)}
        if step==0: replies = asked
    n = self.max_new_tokens if replies else self._length(seconds, last)
    if n<self.least: return []
    start = time.monotonic()
    rows = self.rows(tok, step, replies or self.ask(model, tok, n), n)
    if step: self.spent += time.monotonic()-start
    self.log(rows)
    return rows

def write_samples(
    folder:Path, # A `checkpoint-N`
    rows:list[dict], # Of all steps so far
):
    "Write the rows beside a checkpoint's state."
    import pyarrow as pa, pyarrow.parquet as pq
    names = dict.fromkeys(k for r in rows for k in r)
    if rows: pq.write_table(pa.table({k: [r.get(k) for r in rows] for k in names}), Path(folder)/'samples.parquet')

def read_samples(
    folder:Path, # A `checkpoint-N`
)->list[dict]: # No rows where it has none
    "Read them again."
    import pyarrow as pa, pyarrow.parquet as pq
    file = Path(folder)/'samples.parquet'
    if not file.exists(): return []
    try: rows = pq.read_table(file).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as e:
        raise UserError(file.name, f"it can't be read ({excerpt(e, 60)})", "it isn't of a run of phoque") from None
    kinds = dict(step=int, prompt=str, response=str, base_response=str)
    if all(isinstance(r.get(k), kind) for r in rows for k,kind in kinds.items()): return rows
    raise UserError(file.name, "a row without step, prompt, response and base_response", "it isn't of a run of phoque")

# ------------------------------------------------------------------------------
# parallel.ranks: Several GPUs: start, stop and fail together, on one machine or several
# ------------------------------------------------------------------------------

class Ranks:
    "The processes of a job: which of them this is, and what they tell each other."
    def __init__(self):
        def told(name, alone): return int(os.environ.get(name, alone)) # as torchrun sets it
        self.rank,self.world_size = told('RANK', 0),told('WORLD_SIZE', 1)
        self.local,self.n_local = told('LOCAL_RANK', 0),told('LOCAL_WORLD_SIZE', 1)
        self.is_main = self.rank==0
        if self.world_size>1: self.connect()

@patch
def connect(self:Ranks):
    "Join the other ranks."
    import torch, torch.distributed as dist
    from datetime import timedelta
    cuda = torch.cuda.is_available()
    if cuda: torch.cuda.set_device(self.local)
    if not dist.is_initialized(): dist.init_process_group('nccl' if cuda else 'gloo', timeout=timedelta(minutes=5)) # within a step
    self.group = dist.new_group(backend='gloo', timeout=timedelta(hours=2)) # between steps
    dist.barrier(group=self.group) # where they meet is rank 0's own: nobody leaves before all are connected

@patch
def broadcast(self:Ranks,
    value=None, # On rank 0
): # The same on every rank
    "What rank 0 has."
    if self.world_size==1: return value
    import torch.distributed as dist
    box = [value]
    dist.broadcast_object_list(box, src=0, group=self.group)
    return box[0]

@patch
def any_rank(self:Ranks,
    flag:bool, # On this rank
)->bool: # The same on every rank
    "Is it true on some rank?"
    if self.world_size==1: return bool(flag)
    import torch, torch.distributed as dist
    seen = torch.tensor(int(flag))
    dist.all_reduce(seen, dist.ReduceOp.MAX, group=self.group)
    return bool(seen)

@patch
def gather(self:Ranks,
    value, # On this rank
)->list: # On rank 0 all of them, in order; on others empty
    "What every rank has."
    if self.world_size==1: return [value]
    import torch.distributed as dist
    seen = [None]*self.world_size if self.is_main else None
    dist.gather_object(value, seen, dst=0, group=self.group)
    return seen or []

@patch
def barrier(self:Ranks):
    "Until all are here."
    if self.world_size==1: return
    import torch.distributed as dist
    dist.barrier(group=self.group)

@patch
@contextmanager
def main_first(self:Ranks):
    "The first rank of each machine goes ahead: what it downloads and prepares, the others find there."
    if self.local: self.barrier()
    yield
    if not self.local: self.barrier()

@patch
def share_folder(self:Ranks,
    folder:Path, # Of rank 0; None for none
):
    "Rank 0's files, on every machine."
    if self.world_size==self.n_local or not folder: return
    files = self.broadcast({p.name:p.read_bytes() for p in Path(folder).iterdir()} if self.is_main else None)
    if not self.local and not self.is_main:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name,data in files.items(): (Path(folder)/name).write_bytes(data)
    self.barrier()

LOST = 'lost contact with another rank'

def lost_rank(
    e:Exception, # What ended this rank
)->bool: # Is it the end of another one that it has noticed?
    "Tell a cause from its consequence."
    import torch.distributed as dist
    if isinstance(e, dist.DistError): return True
    return isinstance(e, RuntimeError) and bool(re.search('gloo|NCCL|Connection (closed|reset) by peer', str(e)))

def report_error(
    text:str, # One line
):
    "An error's line: to the log, or to the launcher that waits for it."
    if f := os.environ.get('TORCHELASTIC_ERROR_FILE'):
        Path(f).write_text(json.dumps(dict(message=text, timestamp=int(time.time()))))
    else: log.error(f"error: {text}")

def explain_ranks(
    failures:dict, # rank → torch's `ProcessFailure`: those that ended first
)->int: # The job's exit code
    "One line for what ended a job of several ranks."
    rank,f = min(failures.items(), key=lambda o: (LOST in o[1].message, o[1].timestamp))
    if f.exitcode>1: return f.exitcode # not an error: stopped, with a checkpoint
    if f.exitcode<0:
        memory = " (out of memory?)"*(f.exitcode==-signal.SIGKILL)
        why = f"rank {rank} was ended by {f.signal_name()}{memory}: run the same command again to continue"
    elif 'traceback' in f.message: why = f"rank {rank} failed: its traceback is above"
    else: why = f.message
    log.error(f"error: {why}")
    return 1

def needs_launch()->bool: # Is this the process that must start the ranks?
    "Are there several GPUs, or machines, and is this none of their ranks?"
    if 'RANK' in os.environ: return False
    import torch
    os.environ.setdefault('PET_NPROC_PER_NODE', str(max(torch.cuda.device_count(), 1)))
    return (os.environ['PET_NPROC_PER_NODE'], os.environ.get('PET_NNODES', '1')) != ('1','1')

def group_addresses(
    host:str, # Name that stands for every machine
)->list: # Sorted
    "The addresses behind a name."
    try: return sorted({a[4][0] for a in socket.getaddrinfo(host, None, socket.AF_INET)})
    except socket.gaierror: return []

def own_address(
    towards:str, # Another address
)->str: # This machine's, as that one sees it
    "Which of our addresses leads there? Nothing is sent."
    if a := os.environ.get('PET_LOCAL_ADDR'): return a
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect((towards, 9))
        return s.getsockname()[0]

def machine_flags(
    patience:float=900, # Seconds to wait for the other machines
)->list: # For torchrun
    "Where ranks meet: the machines of a network group, or those of one machine at a port of their own."
    host = os.environ.get('HF_NETWORK_GROUP_HOSTNAME')
    n = os.environ.get('PET_NNODES', '' if host else '1')
    if n=='1': return ['--standalone']
    if not host: return [] # whoever has other machines says where they meet
    if not n.isdigit():
        raise UserError("PET_NNODES", f"must be the number of jobs in the network group {host}, got {n!r}",
                        "pass it to each of them")
    end = time.monotonic()+patience
    while len(there := group_addresses(host))<int(n):
        if time.monotonic()>end:
            raise UserError(f"HF_NETWORK_GROUP_HOSTNAME {host}",
                            f"{len(there)} of {n} machines are there after {patience:.0f} s",
                            "start the others, or correct PET_NNODES")
        time.sleep(1)
    here,port = own_address(there[0]),os.environ.get('MASTER_PORT', '29400')
    log.info(f"{n} machines in {host}: they meet at {there[0]}, this is {here}")
    meet = ['--rdzv-backend=c10d', f'--rdzv-endpoint={there[0]}:{port}', f'--rdzv-id={host}']
    return [*meet, f'--rdzv-conf=is_host={int(here==there[0])}', f'--local-addr={here}']

def launch_ranks()->int: # Exit code
    "Start this script again, once for each GPU, and wait for the end of all."
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    import psutil
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run
    for part in ('multiprocessing.api','agent.server.api'): # we say it in one line
        logging.getLogger(f'torch.distributed.elastic.{part}').setLevel(logging.CRITICAL)
    told = []
    def pass_on(sig, frame):
        told.append(sig)
        ranks = psutil.Process().children()
        for p in ranks: p.send_signal(sig)
        if not ranks: raise Stopped
    signal.signal(signal.SIGTERM, pass_on)
    try: run(parse_args(['--signals-to-handle=SIGINT,SIGHUP,SIGQUIT', *machine_flags(), *sys.argv]))
    except ChildFailedError as e:
        if told and all(f.exitcode==-signal.SIGTERM for f in e.failures.values()): raise Stopped # they had only begun
        return explain_ranks(e.failures)
    except SignalException as e:
        raise UserError("this job", f"ended by {e.sigval.name}", "run the same command again to continue") from None
    return 0

# ------------------------------------------------------------------------------
# parallel.shard: FSDP2: shard a model that is too large for one GPU
# ------------------------------------------------------------------------------

def shard_options(
    shard:bool, # Is there something to shard, and ranks to share it?
)->dict: # For `TrainingArguments`
    "FSDP2 in transformers' words."
    return dict(fsdp=True, fsdp_config=dict(version=2, reshard_after_forward=True)) if shard else {}

def prepare_sharding(
    device, # This rank's
    model, # From `add_lora`
):
    "Put embedding and head on the device, before the trainer is made."
    for m in (model.get_input_embeddings(), model.get_output_embeddings()): m.to(device)
    if device.type=='cpu': _shard_on_cpu(model)

def _shard_on_cpu(model):
    "For rehearsals: accelerate shards over GPUs only, and bitsandbytes repacks weights in eval mode."
    from accelerate.state import DistributedType, PartialState
    PartialState._shared_state['distributed_type'] = DistributedType.MULTI_GPU
    for m in model.modules():
        if hasattr(m, 'support_avx512bf16_for_cpu'): m.support_avx512bf16_for_cpu = False

def whole_tensor(
    t, # Anything; a sharded tensor is gathered, so all ranks must ask
): # The same; a tensor that was sharded is whole, and on the CPU
    "Gather what is sharded."
    from torch.distributed.tensor import DTensor
    return t.full_tensor().cpu() if isinstance(t, DTensor) else t

def whole_adapter(
    model, # `PeftModel`; if it is sharded, all ranks must ask
)->dict: # Name → tensor; None for a model that isn't sharded, which can be saved as it is
    "The adapter of a sharded model."
    from torch.distributed.fsdp import FSDPModule
    if not isinstance(model, FSDPModule): return None
    return {n:whole_tensor(p.detach()) for n,p in model.named_parameters() if p.requires_grad}

def own_part(
    t, # A tensor
): # What this rank holds of it
    "This rank's part of a tensor."
    from torch.distributed.tensor import DTensor
    return t.to_local() if isinstance(t, DTensor) else t

def _cut_state(
    state:dict, # Index of a parameter → its optimizer's tensors, whole
    params:list, # Sharded parameters
    device, # This rank's
)->dict: # The same, cut as the parameters are
    "Cut an optimizer's tensors as its parameters are."
    from torch.distributed.tensor import distribute_tensor
    def cut(t, p): return distribute_tensor(t.to(device), p.device_mesh, p.placements) if t.shape else t
    return {i:{k:cut(t, params[i]) for k,t in s.items()} for i,s in state.items()}

class _Sharded:
    "A trainer's methods for a model that is sharded: it gathers what it saves, and cuts what it loads."
    def train(self, resume_from_checkpoint=None, **kwargs):
        "Read the adapter before the model is sharded, then train."
        import torch
        from torch.distributed.fsdp import MixedPrecisionPolicy
        logging.getLogger('torch.distributed.fsdp.fully_shard').setLevel(logging.ERROR)
        plugin = self.accelerator.state.fsdp_plugin
        plugin.mixed_precision_policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        plugin.ignored_modules = [self.model.get_input_embeddings(), self.model.get_output_embeddings()]
        if resume_from_checkpoint: super()._load_from_checkpoint(resume_from_checkpoint)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _load_from_checkpoint(self, *args): "It has been, before the model was sharded."

    def compute_loss_context_manager(self):
        "Autocast around the whole loss."
        return self.accelerator.autocast()

def sharded_trainer(
    Trainer, # Of `train`
): # Its subclass for a model that is sharded
    "A trainer whose checkpoints are those of one process."
    return type('ShardedTrainer', (_Sharded, Trainer), {})

@patch
def save_model(self:_Sharded, output_dir=None, _internal_call=False):
    "Save the adapter, gathered."
    self._save(output_dir, state_dict=whole_adapter(self.model))

@patch
def _save_optimizer_and_scheduler(self:_Sharded, output_dir):
    "Save the optimizer's state, gathered, and the scheduler's."
    from torch.utils._pytree import tree_map
    whole = tree_map(whole_tensor, self.optimizer.state_dict()) # all ranks must ask
    states = dict(optimizer=whole, scheduler=self.lr_scheduler.state_dict())
    if self.args.should_save: self.write_later(output_dir, states)

@patch
def _load_optimizer_and_scheduler(self:_Sharded, checkpoint):
    "Load both, the optimizer's tensors cut as its parameters are."
    import torch
    if not checkpoint: return
    def read(k): return torch.load(f'{checkpoint}/{k}.pt', map_location='cpu', weights_only=True)
    optimizer,params = read('optimizer'),[p for g in self.optimizer.param_groups for p in g['params']]
    optimizer['state'] = _cut_state(optimizer['state'], params, self.args.device)
    self.optimizer.load_state_dict(optimizer)
    self.lr_scheduler.load_state_dict(read('scheduler'))

def check_sharded(
    model, # As it is about to be trained
    ranks:int, # That share it
)->str: # One line
    "Every 4-bit weight, and the adapter, must be in parts."
    params = [p for layer in model.get_base_model().get_decoder().layers for p in layer.parameters()]
    whole = [p for p in params if not hasattr(p, 'placements')]
    if whole: raise UserError("FSDP", f"{len(whole)} of {len(params)} tensors of the layers are not sharded",
                              "the base must be loaded with `shard=True`, and trained by `make_trainer`")
    here,all_ = (sum(p.nbytes for p in ps)/2**20 for ps in (map(own_part, params), params))
    over = f"{ranks} rank{'s'*(ranks>1)}"
    held = f"{here:,.1f} of {all_:,.1f} MiB on this one"
    return f"layers are sharded over {over}: {held}, embedding and head whole on each"

# ------------------------------------------------------------------------------
# fast.layers: LoRA fused into the base matmul, CUDA graphs, products in fp8 or int8, and a loss on supervised tokens only
# ------------------------------------------------------------------------------

def _join_weights(
    weights:list, # 4-bit weights, each with its `quant_state`; they become views of what is returned
)->tuple: # The bytes of all, and their scales, fp32
    "Lay 4-bit weights under one another, in one place only."
    import torch, bitsandbytes.functional as F
    packed = torch.cat([w.data.flatten() for w in weights])
    for w,p in zip(weights, packed.split([w.numel() for w in weights])): w.data = p.view(w.shape)
    def scales(s): return (F.dequantize_blockwise(s.absmax, s.state2)+s.offset).float() if s.nested else s.absmax
    return packed,torch.cat([scales(w.quant_state) for w in weights])

class Nf4Weights:
    "Frozen weights of projections that read the same input, in 4 bits."
    def __init__(self,
        mods:list, # As for `LoraGroup`
    ):
        weights = [m.base_layer.weight for m in mods]
        self.packed,self.absmax = _join_weights(weights)
        self.rows,self.code,self.device = sum(m.out_features for m in mods),weights[0].quant_state.code,self.packed.device
        self.scales = None # for int8

    def beside(self,
        b, ends, out, # As for `unpack`
    ): # The buffer
        "Weights in bf16, and `lora_B` beside them."
        return unpack(self.packed, self.absmax, self.code, b, ends, out)

def _join_biases(
    biases:list, # Of projections; None for none
    sizes:list, # Their outputs
): # One vector, or None where there is no bias
    "Lay biases under one another."
    import torch
    if all(b is None for b in biases): return None
    some = next(b for b in biases if b is not None)
    return torch.cat([some.new_zeros(n) if b is None else b.detach() for b,n in zip(biases, sizes)])

class LoraGroup:
    "Adapted projections that read the same input, as one."
    def __init__(self,
        mods:list, # PEFT's modules, in the order of their outputs
        norm=None, # `Norm` through which they read; None for none
    ):
        import torch
        self.frozen = (Fp8Weights if hasattr(mods[0].base_layer, 'scale') else Nf4Weights)(mods)
        self.kept = self.blocks = None # weights from `keep_weights`; `lora_B` for products in 8 bits
        self.int8 = False # which of them, from `use_8bit`
        self.width,self.sizes = mods[0].in_features,[m.out_features for m in mods]
        self.ends = [sum(self.sizes[:i+1]) for i in range(len(mods)-1)]
        self.rank,self.scaling = mods[0].r['default'],mods[0].scaling['default']
        self.ranks = pow2(self.rank*len(mods)) # columns for all of them
        self.lora_a,self.lora_b = ([getattr(m, f'lora_{k}').default.weight for m in mods] for k in 'AB')
        self.bias = _join_biases([m.base_layer.bias for m in mods], self.sizes)
        self.factor = torch.full((self.width,), self.scaling, device=self.frozen.device) # of `lora_A`'s gradients, a row
        if norm is not None: self.factor *= norm.weight
        rest = self.ranks-self.rank*len(mods)
        blank = torch.zeros(rest, self.width, device=self.frozen.device)
        self.blank = [blank] if rest else [] # with an empty tensor among them, `cat` is four times slower

@patch
def up(self:LoraGroup): # (outputs, ranks), bf16
    "`lora_B` alone, with each projection's in columns of its own."
    return self.weight()[:,self.width:] if self.blocks is None else self.blocks

@patch
def room(self:LoraGroup,
    rows:int, # Of the input
): # Uninitialised, (rows, width+ranks)
    "A buffer for an input and what `lora_A` makes of it."
    import torch
    return torch.empty(rows, self.width+self.ranks, dtype=torch.bfloat16, device=self.frozen.device)

@patch
def weight(self:LoraGroup): # (outputs, width+ranks), bf16
    "Weights, with `lora_B` beside them."
    if self.kept is not None: return self.kept
    out = self.b.new_empty(sum(self.sizes), self.width+self.ranks)
    return self.frozen.beside(self.b, self.ends, out)

@patch
def forward(self:LoraGroup,
    x, # From `room`, its left part written
)->tuple: # Outputs, (rows, outputs), and what `lora_A` makes of the input, (rows, ranks)
    "All projections at once."
    import torch
    xa = torch.mm(x[:,:self.width], self.a.t())
    if self.blocks is not None:
        y = (self.forward_int8 if self.int8 else self.forward_fp8)(x[:,:self.width], xa)
        return (y if self.bias is None else y.add_(self.bias)),xa
    x[:,self.width:] = xa
    w = self.weight().t()
    return torch.mm(x, w) if self.bias is None else torch.addmm(self.bias, x, w),xa

FEW_ROWS = 6144 # up to here two products are faster

@patch
def back(self:LoraGroup,
    dy, # Gradient of the outputs
    apart:bool=False, # In two products
): # (rows, width+ranks)
    "Gradients of the input and of what `lora_A` made of it, side by side."
    import torch
    if self.blocks is not None: return self.back8(dy)
    w = self.weight()
    if not apart: return dy@w
    d = dy.new_empty(len(dy), w.shape[1])
    for c in (slice(self.width), slice(self.width, None)): torch.mm(dy, w[:,c], out=d[:,c])
    return d

def _mm32(a, b):
    "The product of two bf16 matrices, in fp32."
    import torch
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float()@b.float()

@patch
def grad_b(self:LoraGroup,
    dy, # Gradient of the outputs
    xa, # From `forward`
)->list: # fp32, one a projection
    "Gradients of `lora_B`."
    return [d[:,i*self.rank:(i+1)*self.rank] for i,d in enumerate(_mm32(dy.t(), xa).split(self.sizes))]

@patch
def grad_a(self:LoraGroup,
    dxa, # Gradient of what `lora_A` made, (rows, ranks)
    x, # What it had read, (rows, width), but for a norm's weights
)->list: # fp32, one a projection, yet to be scaled
    "Gradients of `lora_A`."
    return list(_mm32(dxa.t(), x)[:self.rank*len(self.sizes)].split(self.rank))

def _nll(z, targets, dtype):
    "Negative log-likelihoods, and the gradient of their sum: by `nll_rows`, or without a GPU by torch."
    import torch
    if z.is_cuda: return nll_rows(z, targets, dtype)
    p = z.log_softmax(-1)
    dz = p.exp()-torch.nn.functional.one_hot(targets, z.shape[1])
    return -p.gather(1, targets[:,None])[:,0],dz.to(dtype)

@functools.cache
def _head_loss():
    "Autograd's function for `supervised_nll`."
    import torch

    class HeadLoss(torch.autograd.Function):
        "Loss and gradient in one go."
        @staticmethod
        def forward(ctx, h, weight, targets):
            nll,dh = h.new_zeros((), dtype=torch.float32),torch.empty_like(h)
            rows = max(HEAD_LOGITS//weight.shape[0], 1)
            for x,y,d in zip(h.split(rows), targets.split(rows), dh.split(rows)):
                if not len(y): break
                part,dz = _nll(_mm32(x, weight.t()), y, weight.dtype)
                nll += part.sum()
                if ctx.needs_input_grad[0]: torch.mm(dz, weight, out=d)
            ctx.save_for_backward(dh)
            return nll

        @staticmethod
        def backward(ctx, g):
            dh, = ctx.saved_tensors
            return (dh.float()*g).to(dh.dtype),None,None
    return HeadLoss

def supervised_nll(
    hidden, # What enters the head, (rows, hidden)
    weight, # Of the head, (vocabulary, hidden); gets no gradient
    targets, # The right token of each row
): # Sum of their negative log-likelihoods in nats, fp32
    "Cross-entropy of the rows that have a label."
    return _head_loss().apply(hidden.to(weight.dtype), weight, targets)

class Norm(NamedTuple):
    "An RMSNorm as kernels take it."
    weight:object # What it multiplies by, (width,)
    variance_epsilon:float # Added to the mean of squares

def _as_norm(module, plus_one):
    "A module's norm; Gemma's multiply by one more than their weights."
    w = module.weight.detach()
    return Norm(1+w.float(), module.eps) if plus_one else Norm(w, module.variance_epsilon)

def _window(at, kind, max_length):
    "Tokens that a query of this attention sees in a row; 0 for all before it."
    n = at.config.sliding_window if kind.one_window else vars(at).get('sliding_window')
    return n if n and (not max_length or n<max_length) else 0

def _way_to_turn(at, kind):
    "How an attention's queries and keys are turned: by its layer's type, by the one rotary there is (''), or not (None)."
    if kind.by_type: return at.config.layer_types[at.layer_idx]
    return '' if vars(at).get('use_rope', True) else None

class FastLayer:
    "A decoder layer: four groups, and kernels between."
    def __init__(self,
        layer, # Of transformers, adapted by PEFT
        max_length:int=0, # Tokens of a row; a window that isn't shorter is none. 0 for any number
    ):
        at,kind = layer.self_attn,FAST_LAYERS[type(layer).__name__]
        def norms(module, names): return [n and _as_norm(getattr(module, n), kind.plus_one) for n in names]
        self.norm1,self.after1,self.norm2,self.after2 = norms(layer, kind.norms)
        mods = {k:[layer.get_submodule(n) for n in names] for k,names in fast_projections(layer).items()}
        self.qkv,self.o = LoraGroup(mods['qkv'], self.norm1),LoraGroup(mods['o'])
        self.gu,self.down = LoraGroup(mods['gu'], self.norm2),LoraGroup(mods['down'])
        self.groups = [self.qkv, self.o, self.gu, self.down]
        n = self.o.width//at.head_dim
        self.heads = n,(sum(self.qkv.sizes)//at.head_dim-n)//2,at.head_dim
        self.qk_norms = norms(at, [n for n,_ in at.named_children() if n in ('q_norm','k_norm')])
        cap = at.attn_logit_softcapping if kind.capped else None
        self.scores = dict(scale=at.scaling, cap=cap or 0., window=_window(at, kind, max_length))
        self.gate = dict(gelu=gate_activation(layer)=='GELUTanh')
        self.factor = vars(layer).get('residual_multiplier', 1.)
        self.joined,self.way = kind.joined,_way_to_turn(at, kind)
        self.turned = 0 # which of the stack's ways it is

class Stack:
    "All layers of a decoder."
    def __init__(self,
        decoder, # Of a `PeftModel`: see `why_not_fast`
        max_length:int=0, # As of `FastLayer`
    ):
        import torch
        self.layers = [FastLayer(l, max_length) for l in decoder.layers]
        self.norm = _as_norm(decoder.norm, FAST_LAYERS[type(decoder.layers[0]).__name__].plus_one)
        self.rotary,self.embedding = decoder.rotary_emb,vars(decoder).get('embedding_multiplier', 1.)
        self.ways = list(dict.fromkeys(l.way for l in self.layers)) # in which layers turn queries and keys
        for l in self.layers: l.turned = self.ways.index(l.way)
        self.rope = getattr(decoder.config, 'rope_parameters', None) or {}
        self.checkpoint = False # recompute each layer in the backward pass
        self.precision = 'bf16' # of products, from `use_8bit`
        self.passes,self.replays = {},{} # how often a shape of batch was seen, and its `Replay`
        self.kept = [] # of each kind of group, all layers': the weights from `keep_weights`, or `lora_B` alone for 8 bits
        self.groups = [g for l in self.layers for g in l.groups]
        self.params = [p for k in ('lora_a','lora_b') for g in self.groups for p in getattr(g, k)]
        self.factor = torch.cat([g.factor.repeat(g.rank*len(g.sizes)) for g in self.groups])

@patch
def cast_adapter(self:Stack):
    "The adapter in bf16, scaled."
    import torch
    a = torch.cat([p.detach().flatten() for g in self.groups for p in (*g.lora_a, *g.blank)])*self.groups[0].scaling
    b = torch.cat([p.detach().flatten() for g in self.groups for p in g.lora_b])
    a,b = a.to(torch.bfloat16),b.to(torch.bfloat16)
    parts_a = a.split([g.ranks*g.width for g in self.groups])
    parts_b = b.split([sum(g.sizes)*g.rank for g in self.groups])
    for g,x,y in zip(self.groups, parts_a, parts_b): g.a,g.b = x.view(g.ranks, g.width),y.view(-1, g.rank)
    if self.kept: self.renew_kept(b.view(len(self.layers), -1))
    if self.precision=='fp8': self.renew_fp8()

@patch
def turn(self:Stack,
    h, # Embedded tokens, (rows, tokens, hidden)
    position_ids, # Each document's from 0, (rows, tokens)
)->tuple: # Cosines and sines, (ways, tokens, head_dim), and what queries are multiplied by, (tokens,)
    "How queries and keys are turned, and queries scaled."
    import torch
    n,d = position_ids.numel(),self.layers[0].heads[2]
    none = torch.ones(n, d, dtype=h.dtype, device=h.device),torch.zeros(n, d, dtype=h.dtype, device=h.device)
    def one(way): return none if way is None else self.rotary(h, position_ids, *[way]*bool(way))
    cos,sin = (torch.stack([t.reshape(n, d) for t in ts]) for ts in zip(*map(one, self.ways)))
    scale,beta = torch.ones(n, device=h.device),self.rope.get('llama_4_scaling_beta')
    if beta: # transformers' get_llama_4_attn_scale
        contexts = torch.floor(position_ids.flatten()/self.rope['original_max_position_embeddings'])
        scale += beta*torch.log1p(contexts)
    return cos,sin,scale

class SavedAttention(NamedTuple):
    "What attention's backward pass needs of its forward pass, by token but for the last two."
    h:object # Residual stream that came in
    rms:object # One over its RMS
    xa:object # What `lora_A` of queries, keys and values made
    read:list # What the norms of queries and keys read, and one over its RMS
    qkv:object # Queries, keys and values, the first two turned
    lse:object # Second output of `attend`
    o:object # Its first, (tokens, width+ranks)
    kept:object # The rows of `o` that go on
    xa_o:object # What `lora_A` of the output projection made of them
    after:object # What the norm after attention read, and one over its RMS; None for no norm

class SavedMLP(NamedTuple):
    "What the MLP's backward pass needs of its forward pass, by row."
    h:object # Residual stream that came in
    rms:object # One over its RMS
    xa:object # What `lora_A` of gate and up made
    gu:object # Gate and up; they become their gradients
    xa_down:object # What `lora_A` of the down projection made
    after:object # As in `SavedAttention`, of the norm after the MLP

def _enter(h, y, norm, x):
    "The sum of both, and in the left part of `x` its norm; the sum itself where there is no norm."
    if norm: return add_norm(h, y, norm, x)
    total = h if y is None else h+y
    x[:,:h.shape[1]] = total
    return total,None

@patch
def after(self:FastLayer,
    y, # What the last projection of a half gives
    norm, # `Norm` behind it; None for none
)->tuple: # What is added to the residual stream, and what the norm read with one over its RMS
    "From a half's last projection to the residual stream."
    import torch
    if not norm: return (y if self.factor==1 else y*self.factor),None
    out = torch.empty_like(y)
    return out,(y, add_norm(y, None, norm, out)[1])

@patch
def queries_and_keys(self:FastLayer,
    qkv, # (tokens, (heads_q+2·heads_k)·head_dim)
)->tuple: # Views of it
    "The parts of a product that are turned."
    q,k,d = self.heads
    return qkv[:,:q*d],qkv[:,q*d:(q+k)*d]

@patch
def norm_heads(self:FastLayer,
    qkv, # Queries, keys and values; the first two are normalised in place
)->list: # What each norm read, and one over the RMS of its rows
    "Queries and keys through their norms, where they have some."
    import torch
    read = []
    for norm,part in zip(self.qk_norms, self.queries_and_keys(qkv)):
        raw = part.clone(memory_format=torch.contiguous_format).view(-1, len(norm.weight))
        out = torch.empty_like(raw)
        read.append((raw, add_norm(raw, None, norm, out)[1]))
        part.copy_(out.view_as(part))
    return read

@patch
def own_turn(self:FastLayer, turn):
    "What `rope` takes, of what the stack's `turn` gave."
    cos,sin,scale = turn
    return cos[self.turned],sin[self.turned],scale

@patch
def attention(self:FastLayer,
    h, # Residual stream, (tokens, hidden)
    y, # What the layer before adds to it; None for nothing
    turn:tuple, # From the stack's `turn`
    tiles, # As for `attend`
    keep=None, # Rows that go on, filled up with len(h) for none; None for all
)->tuple: # Residual stream of those rows, what attention adds to it, and a `SavedAttention`
    "Through the first half of the layer."
    x = self.qkv.room(len(h))
    h,rms = _enter(h, y, self.norm1, x)
    qkv,xa = self.qkv.forward(x)
    read = self.norm_heads(qkv)
    rope(qkv, self.own_turn(turn), self.heads)
    o = self.o.room(len(h))
    lse = attend(qkv, o, tiles, self.heads, **self.scores)
    on,kept = h,o
    if keep is not None: on,kept = (t.index_select(0, keep.clamp(max=len(h)-1)) for t in (h,o))
    y,xa_o = self.o.forward(kept)
    y,after = self.after(y, self.after1)
    return on,y,SavedAttention(h, rms, xa, read, qkv, lse, o, kept, xa_o, after)

@patch
def mlp(self:FastLayer,
    h, # Residual stream, (rows, hidden)
    y, # What attention adds to it
)->tuple: # Residual stream, what the MLP adds to it, and a `SavedMLP`
    "Through the second half of the layer."
    x = self.gu.room(len(y))
    h,rms = _enter(h, y, self.norm2, x)
    gu,xa = self.gu.forward(x)
    x = self.down.room(len(y))
    swiglu(gu, x, **self.gate)
    y,xa_down = self.down.forward(x)
    y,after = self.after(y, self.after2)
    return h,y,SavedMLP(h, rms, xa, gu, xa_down, after)

@patch
def forward(self:FastLayer,
    h, # Residual stream, (tokens, hidden)
    y, # What the layer before adds to it; None for nothing
    turn:tuple, # As for `attention`
    tiles, # As for `attend`
    keep=None, # As for `attention`
)->tuple: # Residual stream, what this layer adds to it, and what `backward` needs
    "Through attention and the MLP."
    h,y,attention = self.attention(h, y, turn, tiles, keep)
    h,y,mlp = self.mlp(h, y)
    return h,y,(attention,mlp)

@patch
def forward(self:Stack,
    h, # Embedded tokens, (tokens, hidden)
    cos, sin, scale, # From `turn`
    tiles, # From `attention_tiles`, an int32 tensor
    keep, # Supervised rows, filled up with len(h)
)->tuple: # What enters the head, (len(keep), hidden), and what `backward` needs
    "Through all layers and the last norm."
    import torch
    self.cast_adapter()
    y,saved = None,[]
    for l in self.layers:
        h,y,s = l.forward(h, y, (cos,sin,scale), tiles, keep if l is self.layers[-1] else None)
        saved.append(s[0].h if self.checkpoint else s)
    x = torch.empty_like(h)
    return x,[*saved, add_norm(h, y, self.norm, x)]

def _enter_back(h, rms, norm, d, a, xa, skip):
    "As `norm_back`, also where there is no norm."
    import torch
    if norm: return norm_back(h, rms, norm, d, a, xa, skip)
    n = h.shape[1]
    return torch.addmm(d[:,:n]+skip, d[:,n:], a),d[:,n:]

def _back_alone(h, rms, norm, d):
    "Back through a norm that nothing adapted read."
    import torch
    none = d.new_zeros(len(d), 16)
    no_a,skip = none.new_zeros(16, h.shape[1]),torch.zeros_like(h)
    return norm_back(h, rms, norm, torch.cat([d, none], 1), no_a, none, skip)[0]

@patch
def after_back(self:FastLayer, dh, norm, read):
    "Back through `after`."
    if norm: return _back_alone(*read, norm, dh)
    return dh if self.factor==1 else dh*self.factor

@patch
def norm_heads_back(self:FastLayer, dqkv, read):
    "Back through `norm_heads`, in place."
    for norm,part,(raw,rms) in zip(self.qk_norms, self.queries_and_keys(dqkv), read):
        part.copy_(_back_alone(raw, rms, norm, part.reshape(raw.shape)).view_as(part))

@patch
def mlp_back(self:FastLayer,
    s:SavedMLP, # From `mlp`; used up
    dh, # Gradient of the residual stream after the layer
)->tuple: # As from `backward`, of the MLP
    "Back through the MLP."
    import torch
    dy = self.after_back(dh, self.after2, s.after)
    d,b_down = self.down.back(dy),self.down.grad_b(dy, s.xa_down)
    a_down,*b_gu = swiglu_back(s.gu, d, self.down.a, s.xa, self.down.rank, **self.gate, joined=self.joined)
    if self.joined: b_gu = [torch.cat(b_gu)]
    d = self.gu.back(s.gu)
    dh,z = _enter_back(s.h, s.rms, self.norm2, d, self.gu.a, s.xa, dh)
    return dh,[*self.gu.grad_a(z, s.h), a_down],[*b_gu, *b_down]

@patch
def attention_back(self:FastLayer,
    s:SavedAttention, # From `attention`; used up
    dh, # Gradient of the residual stream between attention and MLP
    turn:tuple, tiles, keep=None, # As in `attention`
    first:bool=False, # Nothing below it learns
)->tuple: # As from `backward`, of attention
    "Back through attention."
    w,n = self.o.width,len(s.h)
    dy = self.after_back(dh, self.after1, s.after)
    d,b_o = self.o.back(dy),self.o.grad_b(dy, s.xa_o)
    a_o = self.o.grad_a(d[:,w:], s.kept[:,:w])
    if keep is not None: dh,d = (x.new_zeros(n+1, x.shape[1]).index_copy_(0, keep, x)[:-1] for x in (dh,d))
    dqkv = attend_bwd(s.qkv, s.o, s.lse, d, self.o.a, self.own_turn(turn), tiles, self.heads, **self.scores)
    self.norm_heads_back(dqkv, s.read)
    b_qkv = self.qkv.grad_b(dqkv, s.xa)
    if first:
        z = dqkv@self.qkv.up()
        if self.norm1: z *= s.rms[:,None].to(s.h.dtype)
    else:
        d = self.qkv.back(dqkv, n<=FEW_ROWS)
        dh,z = _enter_back(s.h, s.rms, self.norm1, d, self.qkv.a, s.xa, dh)
    return dh,[*self.qkv.grad_a(z, s.h), *a_o],[*b_qkv, *b_o]

@patch
def backward(self:FastLayer,
    saved:tuple, # From `forward`; used up
    dh, # Gradient of the residual stream after the layer
    turn:tuple, # As in `forward`
    tiles, # As in `forward`
    keep=None, # As in `forward`
    first:bool=False, # Nothing below it learns
)->tuple: # Gradient of the residual stream before it, those of `lora_A`, yet to be scaled, and those of `lora_B`
    "Back through the MLP and attention."
    attention,mlp = saved
    dh,a_mlp,b_mlp = self.mlp_back(mlp, dh)
    dh,a,b = self.attention_back(attention, dh, turn, tiles, keep, first)
    return dh,a+a_mlp,b+b_mlp

@patch
def backward(self:Stack,
    saved:list, # From `forward`; used up
    dx, # Gradient of what enters the head
    cos, sin, scale, tiles, keep, # As in `forward`
): # Gradients of `params`, one after the other, fp32
    "Back through the last norm and all layers."
    import torch
    (h,rms),turn = saved.pop(),(cos,sin,scale)
    dh = _back_alone(h, rms, self.norm, dx)
    grads_a,grads_b = [],[]
    for l in reversed(self.layers):
        s,on = saved.pop(),keep if l is self.layers[-1] else None
        if self.checkpoint: s = l.forward(s, None, turn, tiles, on)[2]
        dh,a,b = l.backward(s, dh, turn, tiles, on, l is self.layers[0])
        grads_a,grads_b = a+grads_a,b+grads_b
    grads = self.factor.new_empty(sum(p.numel() for p in self.params))
    a,b = grads[:len(self.factor)],grads[len(self.factor):].view(-1, self.groups[0].rank)
    torch.cat([g.flatten() for g in grads_a], out=a)
    torch.cat(grads_b, out=b) # they lie apart, and are read there
    a *= self.factor
    return grads

class Replay:
    "A stack's passes over one shape of batch, recorded."
    def __init__(self,
        stack:Stack, # That ran on such a batch before
        given:tuple, # What its `forward` takes
    ):
        import torch
        torch.cuda.empty_cache() # what passes took until now goes to the recorded ones
        self.given,pool = [t.clone() for t in given],torch.cuda.graph_pool_handle()
        self.fwd_graph,self.bwd_graph = torch.cuda.CUDAGraph(),torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.fwd_graph, pool=pool, capture_error_mode='thread_local'):
            self.x,saved = stack.forward(*self.given)
        self.dx = torch.zeros_like(self.x)
        with torch.cuda.graph(self.bwd_graph, pool=pool, capture_error_mode='thread_local'):
            self.grads = stack.backward(saved, self.dx, *self.given[1:])

    def forward(self, given):
        "Forward, on these tensors."
        for to,t in zip(self.given, given): to.copy_(t)
        self.fwd_graph.replay()
        return self.x.clone()

    def backward(self, dx):
        "Back from there."
        self.dx.copy_(dx); self.bwd_graph.replay()
        return self.grads

@patch
def replay(self:Stack,
    given:tuple, # What `forward` takes
)->Replay: # None while such a batch is new, or where there are no graphs
    "The recorded passes for a batch of this shape."
    if not given[0].is_cuda: return None
    shape = tuple(t.shape for t in given)
    self.passes[shape] = self.passes.get(shape, 0)+1
    if self.passes[shape]==4: self.replays[shape] = Replay(self, given)
    return self.replays.get(shape)

@functools.cache
def _through():
    "Autograd's function for a `Stack`."
    import torch
    from accelerate.utils import reduce

    class Through(torch.autograd.Function):
        "A stack's passes, recorded where there is a recording."
        @staticmethod
        def forward(ctx, stack, h, cos, sin, scale, tiles, keep, *params):
            given = h,cos,sin,scale,tiles,keep
            ctx.stack,ctx.given,ctx.replay = stack,given,stack.replay(given)
            if ctx.replay: return ctx.replay.forward(given)
            x,ctx.saved = stack.forward(*given)
            return x

        @staticmethod
        def backward(ctx, dx):
            params = ctx.stack.params
            if ctx.replay: grads = ctx.replay.backward(dx)
            else: grads = ctx.stack.backward(ctx.saved, dx, *ctx.given[1:])
            grads = reduce(grads, 'mean') # over ranks; a copy, since a recorded pass will write over its own
            parts = grads.split([p.numel() for p in params])
            return *[None]*7,*(g.view(p.shape) for g,p in zip(parts, params)) # none for what isn't a parameter
    return Through

@patch
def __call__(self:Stack,
    h, # Embedded tokens, (rows, tokens, hidden)
    position_ids, # Each document's from 0, (rows, tokens)
    tiles, # As in `forward`
    keep, # As in `forward`
): # What enters the head, with the adapter's gradients to come
    "Let autograd pass."
    import torch
    given = h.detach().flatten(0,1)*self.embedding,*self.turn(h, position_ids),tiles,keep
    with torch.autocast(h.device.type, enabled=False): return _through().apply(self, *given, *self.params)

def _other_blocks(weight):
    "Why `unpack` can't read a weight: it knows one layout, a byte for two weights and a scale for 64."
    q = getattr(weight, 'quant_state', None)
    if not q: return # fp8
    if q.blocksize!=64: return f"its NF4 has blocks of {q.blocksize} weights"
    if weight.element_size()!=1 or q.shape.numel()%64: return "its NF4 isn't in bytes and whole blocks of 64 weights"

def _why_not_projections(mods):
    "Why projections can't be a `LoraGroup`'s."
    def in_nf4(w): return hasattr(w, 'quant_state') and w.quant_type=='nf4'
    adapted = all(hasattr(m, 'lora_A') for m in mods)
    if not adapted or not (all(in_nf4(m.base_layer.weight) for m in mods) or all(hasattr(m.base_layer, 'scale') for m in mods)):
        return "not every projection is in NF4, or in fp8, and adapted"
    if why := next(filter(None, (_other_blocks(m.base_layer.weight) for m in mods)), None): return why
    if mods[0].r['default']>512: return f"its adapter's rank of {mods[0].r['default']} is more than 512"
    dropouts = [m.lora_dropout.default for m in mods]
    if any(d.p for d in dropouts if hasattr(d, 'p')): return "lora_dropout isn't 0"

def why_not_fast(
    model, # From `add_lora`
)->str: # None if it can
    "Why a model's layers can't be a `Stack`."
    if why := why_not_known(model.get_base_model()): return why
    layers = decoder_layers(model.get_base_model())
    return _why_not_projections([l.get_submodule(n) for l in layers for ns in fast_projections(l).values() for n in ns])

CARD_OF = dict(fp8=(8,9), int8=(8,0)) # the first compute capability with such products: Ada and Ampere

def no_8bit(
    precision:str, # 'fp8' or 'int8'
    why:str, # What is in the way
)->UserError:
    "The error of a run that asks for products in 8 bits where they can't be had."
    return UserError(f"MIXED_PRECISION={precision}", f"products in {precision} can't be had here: {why}", "set MIXED_PRECISION=bf16")

def check_card(
    precision:str, # As for `no_8bit`
):
    "Refuse products in 8 bits on a card without them."
    import torch
    if not torch.cuda.is_available(): raise no_8bit(precision, "there is no CUDA device")
    if torch.cuda.get_device_capability()<CARD_OF[precision]:
        raise no_8bit(precision, f"{torch.cuda.get_device_name()} multiplies none")

def why_not_8bit(
    model, # As for `why_not_fast`
    precision:str, # As for `no_8bit`
)->str: # None if they can
    "Why a stack's products can't be in 8 bits: it knows rows of whole blocks."
    layers = [m.base_layer for l in decoder_layers(model.get_base_model()) for m in l.modules() if hasattr(m, 'base_layer')]
    rows = dict(fp8=16, int8=64)[precision]
    if odd := next((l for l in layers if l.in_features%64 or l.out_features%rows), None):
        return f"a layer of {odd.in_features} × {odd.out_features} isn't in whole blocks of 64 and {rows}"

LAYER_ERROR = .05 # of what a layer adds; bf16 makes about .01

def _own_additions(model, h):
    "What each layer of transformers adds to the rows `h`, (1, tokens, hidden)."
    import torch
    from contextlib import ExitStack
    added = []
    def enter(layer, args, kwargs): return (h, *args[1:]),kwargs
    def leave(layer, args, out): added.append(out[0]-h[0])
    with ExitStack() as hooks:
        for l in decoder_layers(model):
            hooks.callback(l.register_forward_pre_hook(enter, with_kwargs=True).remove)
            hooks.callback(l.register_forward_hook(leave).remove)
        with torch.autocast(h.device.type, torch.bfloat16): model.get_decoder()(inputs_embeds=h, use_cache=False)
    return added

def layer_errors(
    model, # From `add_lora`
    stack:Stack, # Of its layers
    n:int=24, # Rows
)->list: # One a layer, as a share of what transformers' layer adds
    "How far what each of our layers adds is from what transformers' own does."
    import torch
    device = model.get_input_embeddings().weight.device
    h = torch.randn(1, n, stack.layers[0].o.sizes[0], generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    tiles = torch.tensor(attention_tiles([n]), dtype=torch.int32, device=device)
    with preserve_training_state(model):
        stack.cast_adapter()
        turn,errors = stack.turn(h, torch.arange(n, device=device)[None]),[]
        for l,want in zip(stack.layers, _own_additions(model.get_base_model(), h.float())):
            on,y,_ = l.attention(h[0], None, turn, tiles)
            got = y.float()+l.mlp(on, y)[1].float()
            errors.append(((got-want).norm()/want.norm()).item())
    return errors

def fast_layers(
    model, # From `add_lora`
    max_length:int, # Tokens of a row
    checkpoint:bool=False, # Recompute each layer in the backward pass
    precision:str='bf16', # Of products with frozen weights; a `UserError` where 'fp8' or 'int8' can't be
)->Stack: # None where it can't be, for a reason that is logged
    "Let a model's layers be a `Stack` in training."
    import torch
    eight = precision!='bf16'
    if eight: check_card(precision)
    if not torch.cuda.is_available(): why = "there is no CUDA device"
    elif torch.cuda.get_device_capability()<(8,0): why = f"{torch.cuda.get_device_name()} is older than Ampere"
    else: why = why_not_fast(model)
    if eight: why = why or why_not_8bit(model, precision)
    stack = None if why else Stack(model.get_base_model().get_decoder(), max_length)
    if stack and not (error := max(layer_errors(model, stack)))<LAYER_ERROR:
        stack,why = None,f"a layer of ours is off by {error:.2f} of what transformers' own adds"
    if eight and why: raise no_8bit(precision, why)
    log.info(f"layers: {'kernels of our own'+f', with products in {precision}'*eight if stack else 'transformers and PEFT, since '+why}")
    if stack: stack.checkpoint = checkpoint
    if eight: stack.use_8bit(precision)
    return stack

def card_room()->float: # GiB; without a GPU, no limit
    "What a run can have of this process's GPU: 6 % are left for fragments."
    import torch
    if not torch.cuda.is_available(): return float('inf')
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return .94*total*torch.cuda.get_per_process_memory_fraction()/2**30

@patch
def renew_kept(self:Stack,
    b, # `lora_B` of all groups, (layers, numbers), bf16
):
    "Put this pass's `lora_B` beside weights that stay unpacked, a projection's of every layer at once."
    at = 0
    for kept,g in zip(self.kept, self.layers[0].groups):
        for i,w in enumerate(kept.split(g.sizes, 1)): # (layers, outputs, width+ranks), or ranks alone
            c,n = w.shape[2]-g.ranks+i*g.rank,w.shape[1]*g.rank
            w[:,:,c:c+g.rank] = b[:,at:at+n].view(len(w), -1, g.rank)
            at += n

def keep_weights(
    stack:Stack, # From `fast_layers`
    room:float, # What training leaves of the card, in GiB
)->float: # GiB that it takes; 0 where there is no room
    "Unpack the weights once, if the card has room for them."
    import torch
    if stack.precision!='bf16': return stack.keep_8bit(room)
    size = sum(sum(g.sizes)*(g.width+g.ranks)*2 for g in stack.groups)/2**30
    if size>room: return 0.
    stack.cast_adapter()
    kinds = list(zip(*(l.groups for l in stack.layers)))
    stack.kept = [torch.stack([g.weight() for g in groups]) for groups in kinds]
    for groups,kept in zip(kinds, stack.kept):
        for g,w in zip(groups, kept): g.kept = w
    log.info(f"layers: the weights stay unpacked, which takes {size:.1f} GiB")
    return size

def _mm8(
    a, a_scale, # (rows, n) in fp8, and (rows, 1)
    b, b_scale, # (columns, n) in fp8, and (columns, 1)
    out, # Buffer, (rows, columns), bf16
): # The buffer
    "The product of rows of fp8; without a GPU, of the numbers that they stand for."
    import torch
    if not len(a): return out
    if not a.is_cuda: return out.copy_(a.float()@b.float().t()*a_scale*b_scale.t())
    options = dict(scale_a=a_scale, scale_b=b_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True)
    return torch._scaled_mm(a, b.t(), **options, out=out)

@patch
def scale_rows(self:Nf4Weights,
    more:int, # Columns to keep free beside the weights
):
    "Find the scale of each row in fp8."
    self.scale,self.more = self.absmax.view(self.rows, -1).amax(1, keepdim=True)/448,more

@patch
def rotate(self:Nf4Weights):
    "Find the scales of weights in int8."
    import torch
    k = self.packed.numel()*2//self.rows
    none,out = (torch.zeros(self.rows, n, dtype=torch.bfloat16, device=self.device) for n in (1,k+16))
    self.scales = rotated_scales(self.beside(none, [], out)[:,:k])

@patch
def in_8bit(self:Nf4Weights,
    turned:bool=False, # Columns as rows, for the backward pass
): # (rows, columns and `more`), or (columns, rows)
    "Weights in fp8, each row over its scale, or in int8."
    import torch
    k = self.packed.numel()*2//self.rows
    if self.scales: return pack8(self.packed, self.absmax, self.code, self.scales[turned], (self.rows,k), turned)
    shape = (k,self.rows) if turned else (self.rows,k+self.more)
    out = torch.empty(shape, dtype=torch.float8_e4m3fn, device=self.device)
    return unpack8(self.packed, self.absmax, self.code, self.scale, out, turned)

@patch
def eight(self:LoraGroup,
    turned:bool=False, # As for `in_8bit`
):
    "Frozen weights in 8 bits, or turned; for fp8 `lora_B` is beside those that aren't."
    w = self.kept[turned] if self.kept else self.frozen.in_8bit(turned)
    if not turned and not self.int8: w[:,self.width:] = self.up8
    return w

@patch
def forward_fp8(self:LoraGroup,
    x, # Input, (rows, width)
    xa, # What `lora_A` makes of it
): # Outputs, (rows, outputs)
    "All projections at once, in fp8."
    w,y = self.eight(),x.new_empty(len(x), sum(self.sizes))
    return _mm8(*quantise(x, None, xa, self.share), w, self.frozen.scale, y)

@patch
def forward_int8(self:LoraGroup,
    x, xa, # As for `forward_fp8`
): # As from `forward_fp8`
    "All projections at once, in int8; `lora_B` multiplies in bf16."
    y = x.new_empty(len(x), sum(self.sizes))
    return product8(*rotate8(x), self.eight(), self.frozen.scales[0], y, xa, self.blocks)

@patch
def back8(self:LoraGroup,
    dy, # Gradient of the outputs
): # As from `back`
    "Gradients of the input, in 8 bits, and of what `lora_A` made of it."
    import torch
    d,w = dy.new_empty(len(dy), self.width+self.ranks),self.eight(turned=True)
    dx = d[:,:self.width]
    if self.int8: product8(*rotate8(dy), w, self.frozen.scales[1], dx)
    else: _mm8(*quantise(dy, self.frozen.scale), w, self.ones, dx)
    torch.mm(dy, self.blocks, out=d[:,self.width:])
    return d

@patch
def use_8bit(self:Stack,
    precision:str, # 'fp8' or 'int8'
):
    "Multiply frozen weights in 8 bits from here on."
    import torch
    self.precision = precision
    kinds = list(zip(*(l.groups for l in self.layers)))
    def room(n, g): return torch.zeros(n, sum(g.sizes), g.ranks, dtype=torch.bfloat16, device=g.frozen.device)
    self.kept,self.scales = [room(len(groups), groups[0]) for groups in kinds],[]
    for groups,kept in zip(kinds, self.kept):
        ones = torch.ones(groups[0].width, 1, device=kept.device)
        for g,w in zip(groups, kept):
            g.blocks,g.ones,g.int8 = w,ones,precision=='int8'
            if g.int8: g.frozen.rotate()
            else: g.frozen.scale_rows(3*g.ranks)
        if precision=='fp8': self.scales.append(torch.stack([g.frozen.scale for g in groups]))

@patch
def renew_fp8(self:Stack):
    "Make this pass's `lora_B` ready to stand beside weights in fp8."
    for groups,kept,scales in zip(zip(*(l.groups for l in self.layers)), self.kept, self.scales):
        for g,up,share in zip(groups, *two_parts(kept/scales)): g.up8,g.share = up,share

@patch
@contextmanager
def in_bf16(self:Stack):
    "Multiply in bf16 inside."
    kept = [(g.blocks,g.kept) for g in self.groups]
    try:
        if self.precision!='bf16':
            for g in self.groups: g.blocks = g.kept = None
        yield
    finally:
        for g,k in zip(self.groups, kept): g.blocks,g.kept = k

@patch
def keep_8bit(self:Stack,
    room:float, # As for `keep_weights`
)->float: # As from `keep_weights`
    "Keep the weights in 8 bits, both ways, if the card has room for them."
    size = sum(sum(g.sizes)*g.width*(1 if hasattr(g.frozen, 'w8') else 2) for g in self.groups)/2**30
    if size>room: return 0.
    for g in self.groups: g.kept = g.frozen.in_8bit(),g.frozen.in_8bit(turned=True)
    log.info(f"layers: the weights stay in {self.precision} for both passes, which takes {size:.1f} GiB")
    return size

@functools.cache
def _fp8_linear():
    "A linear layer's class."
    import torch
    class Fp8Linear(torch.nn.Linear):
        "A frozen layer in fp8, with a scale for each row."
        def __init__(self, layer):
            super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device='meta')
            w,scale = rows_in_fp8(layer.weight.data)
            self.weight,self.bias = torch.nn.Parameter(w, requires_grad=False),layer.bias
            self.register_buffer('scale', scale)

        def forward(self, x):
            return torch.nn.functional.linear(x, (self.weight.float()*self.scale).to(x.dtype), self.bias)
    return Fp8Linear

def base_in_fp8(
    model, # From `add_lora`, not quantised
):
    "Put a model's frozen linear layers in fp8, but for its head."
    import torch
    for layer in decoder_layers(model.get_base_model()):
        for name,m in list(layer.named_modules()):
            if type(m) is not torch.nn.Linear or '.lora_' in name: continue
            parent,_,own = name.rpartition('.')
            setattr(layer.get_submodule(parent), own, _fp8_linear()(m))

class Fp8Weights:
    "Frozen weights of projections that read the same input, in fp8."
    def __init__(self,
        mods:list, # As for `LoraGroup`
    ):
        import torch
        layers = [m.base_layer for m in mods]
        self.layers,self.scale = layers,torch.cat([l.scale for l in layers])
        self.device = self.scale.device
        self.scale_rows(0)

    def scale_rows(self,
        more:int, # As for `Nf4Weights`
    ):
        "Lay the weights under one another, in one place only."
        import torch
        rows,k = len(self.scale),self.layers[0].in_features
        self.wide = torch.empty(rows, k+more, dtype=torch.float8_e4m3fn, device=self.device)
        self.w8 = self.wide[:,:k]
        for l,w in zip(self.layers, self.w8.split([l.out_features for l in self.layers])):
            w.view(torch.uint8).copy_(l.weight.data.view(torch.uint8))
            l.weight.data = w

@patch
def beside(self:Fp8Weights,
    b, ends, out, # As for `unpack`
): # The buffer
    "Weights in bf16, and `lora_B` beside them."
    (_,k),r = self.w8.shape,b.shape[1]
    out[:,:k] = self.w8.float()*self.scale
    out[:,k:] = 0
    for i,(own,rows) in enumerate(zip(out.tensor_split(ends), b.tensor_split(ends))): own[:,k+i*r:k+(i+1)*r] = rows
    return out

@patch
def in_8bit(self:Fp8Weights,
    turned:bool=False, # Columns as rows, for the backward pass
):
    "Weights in fp8, each row over its scale."
    import torch
    return self.w8.view(torch.uint8).t().contiguous().view(self.w8.dtype) if turned else self.wide

@functools.cache
def _given_output():
    "A decoder's output that has all that a model's forward may ask for: None, but for what it is made with."
    from transformers.modeling_outputs import MoeModelOutputWithPast
    class Given(MoeModelOutputWithPast):
        "Rows that enter a head."
        def __getattr__(self, name): return None
    return Given

def own_logits(
    model, # Causal language model
    own, # Its forward
    rows, # What enters the head, (rows, hidden)
): # Logits, (rows, vocabulary)
    "What a model's own forward makes of rows that its decoder gives."
    decoder = model.get_decoder()
    kept = vars(decoder).get('forward')
    decoder.forward = lambda *args, **kwargs: _given_output()(last_hidden_state=rows[None])
    try: return own(inputs_embeds=rows[None], use_cache=False).logits[0]
    finally:
        del decoder.forward
        if kept: decoder.forward = kept

def head_is_plain(
    model, # Causal language model, whose forward is its own
)->bool: # Logits of small and large rows are those of the product
    "Is a model's head one product, and nothing else?"
    import torch
    weight = model.get_output_embeddings().weight
    sizes = torch.tensor([[0.],[1.],[1000.]], device=weight.device)
    rows = torch.linspace(-1, 1, weight.shape[1], device=weight.device).repeat(3, 1)*sizes
    rows = rows.to(weight.dtype)
    with torch.no_grad(): logits,product = own_logits(model, model.forward, rows).float(),(rows@weight.t()).float()
    return torch.allclose(logits, product, rtol=.02, atol=1e-3*product[1].abs().max().item())

def own_nll(
    model, own, rows, # As for `own_logits`
    targets, # As for `supervised_nll`
): # As from `supervised_nll`
    "The same loss, by the model's own head."
    import torch
    from torch.utils.checkpoint import checkpoint
    def part(h, y):
        return torch.nn.functional.cross_entropy(own_logits(model, own, h).float(), y, reduction='sum')
    n = max(HEAD_LOGITS//model.get_output_embeddings().weight.shape[0], 1)
    parts = (checkpoint(part, h, y, use_reentrant=False) for h,y in zip(rows.split(n), targets.split(n)) if len(y))
    return sum(parts, rows.float().sum()*0)

def add_supervised_head(
    model, # Causal language model, before or after an adapter was put on it
    stack=None, # From `fast_layers`
):
    "Let `model(…, supervised=positions, targets=tokens)` return `supervised_nll` of those positions."
    own,plain,name = model.forward,head_is_plain(model),type(model).__name__
    if not plain:
        log.info(f"loss: by {name}'s own head, which does more than multiply (a cap, a scale or a bias); it is slower")
    @functools.wraps(type(model).forward)
    def forward(self, *args, supervised=None, targets=None, tiles=None, keep=None, **kwargs):
        if supervised is None: return own(*args, **kwargs)
        if stack and self.training:
            rows = stack(self.get_input_embeddings()(kwargs['input_ids']), kwargs['position_ids'], tiles, keep)
            rows = rows[:len(targets)]
        else: rows = self.get_decoder()(*args, use_cache=False, **kwargs).last_hidden_state.flatten(0,1)[supervised]
        if not plain: return own_nll(self, own, rows, targets)
        return supervised_nll(rows, self.get_output_embeddings().weight, targets)
    model.forward = MethodType(forward, model)

PACKED_ERROR = .2 # of what enters the head, as a share of it; bf16 makes a few hundredths, and what is wrong about 1

def _packed_rows(model, ids, sizes, stack):
    "What enters the head of a row of documents, the way that training takes."
    import torch
    from itertools import accumulate
    dev,decoder,given = ids.device,model.get_decoder(),{}
    position = torch.cat([torch.arange(n) for n in sizes])[None].to(dev)
    if stack:
        tiles = torch.tensor(attention_tiles(sizes), dtype=torch.int32, device=dev)
        with stack.in_bf16(): # what is asked is who reads whom, not how it is rounded
            return stack(model.get_input_embeddings()(ids), position, tiles, torch.arange(ids.shape[1], device=dev))
    if model.config.get_text_config()._attn_implementation=='varlen':
        begins = torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=dev)
        given = dict(cu_seq_lens_q=begins, max_length_q=max(sizes))
    return decoder(input_ids=ids, position_ids=position, use_cache=False, **given).last_hidden_state[0]

def packed_error(
    model, # Causal language model, with an adapter or without
    tok, # Its tokenizer
    stack=None, # From `fast_layers`
    sizes:tuple=(24,16), # Tokens of each document, two or more
)->float: # The worst token's
    "How far a packed row is from its documents alone."
    import torch
    from itertools import accumulate
    begins,cfg = list(accumulate(sizes, initial=0)),model.config.get_text_config()
    seeded = torch.Generator().manual_seed(0)
    ids = torch.randint(min(1000, cfg.vocab_size), (1,begins[-1]), generator=seeded)
    ids = ids.to(model.get_input_embeddings().weight.device)
    decoder,attn = model.get_decoder(),cfg._attn_implementation
    def alone(a, b): return decoder(input_ids=ids[:,a:b], use_cache=False).last_hidden_state[0]
    def worst(row, doc): return ((row-doc).float().norm(dim=1)/doc.float().norm(dim=1)).max().item()
    with preserve_training_state(model, tok):
        docs = [alone(a, b) for a,b in zip(begins[1:], begins[2:])] # the first has nothing before it
        cfg._attn_implementation = attn
        rows = _packed_rows(model, ids, sizes, stack).split(sizes)[1:]
        return max(worst(row, doc) for row,doc in zip(rows, docs))

def check_packed(
    model, # Causal language model, with an adapter or without
    tok, # Its tokenizer
    max_length:int, # Tokens of a row
    stack=None, # From `fast_layers`
):
    "Refuse a model that reads a packed row otherwise than its documents."
    c = model.config.get_text_config()
    rope = getattr(c, 'rope_parameters', None) or {}
    for r in [rope, *(v for v in rope.values() if isinstance(v, dict))]:
        if r.get('rope_type') not in ('dynamic','longrope'): continue
        known = r.get('original_max_position_embeddings') or c.max_position_embeddings
        if max_length>known:
            raise UserError("MAX_LENGTH", f"beyond {known} tokens this model counts positions by the longest conversation "
                            f"of a batch ({r['rope_type']}), got {max_length}", f"set MAX_LENGTH={known}")
    window = getattr(c, 'sliding_window', None) or max_length
    error = packed_error(model, tok, stack, (24,16)+(window+32,)*(window<max_length))
    if not error<PACKED_ERROR:
        raise UserError(type(model).__name__, f"in a packed row it reads conversations otherwise than alone "
                        f"(off by {error:.2f} of what enters its head)", "choose another base model")

# ------------------------------------------------------------------------------
# fast.kernels: Triton kernels: RMSNorm, SwiGLU, RoPE, attention, NF4, fp8, int8, loss
# ------------------------------------------------------------------------------

def pow2(
    n:int, # Any
    least:int=16, # Tensor cores take no smaller matrix
)->int: # At least both
    "The next power of two: Triton's blocks have such sides."
    return max(least, 1<<(n-1).bit_length())

@functools.cache
def _norm_kernel():
    "The sum of `h` and `y`, and its norm; a program takes a row."
    import triton, triton.language as tl
    @triton.jit
    def norm(h, y, w, total, x, rstd, s, eps, n, ADD: tl.constexpr, N: tl.constexpr):
        r = tl.program_id(0).to(tl.int64)
        c = tl.arange(0, N)
        ok = c<n
        v = tl.load(h+r*n+c, mask=ok, other=0.).to(tl.float32)
        if ADD:
            v = (v + tl.load(y+r*n+c, mask=ok, other=0.).to(tl.float32)).to(tl.bfloat16)
            tl.store(total+r*n+c, v, mask=ok)
            v = v.to(tl.float32)
        k = tl.rsqrt(tl.sum(v*v, 0)/n + eps)
        tl.store(rstd+r, k)
        tl.store(x+r*s+c, (v*k).to(tl.bfloat16).to(tl.float32)*tl.load(w+c, mask=ok, other=0.).to(tl.float32), mask=ok)
    return norm

def add_norm(
    h, # Residual stream, (rows, hidden)
    y, # What a block adds to it; None for nothing
    norm, # Module with `weight` and `variance_epsilon`
    x, # Buffer, (rows, hidden+rank): its left part becomes the norm
)->tuple: # The sum, and one over the RMS of its rows
    "Add, and normalise."
    import torch
    rows,n = h.shape
    total = h if y is None else torch.empty_like(h)
    rstd = torch.empty(rows, dtype=torch.float32, device=h.device)
    if not rows: return total,rstd
    eps,add = norm.variance_epsilon,y is not None
    _norm_kernel()[(rows,)](h, y, norm.weight, total, x, rstd, x.stride(0), eps, n, ADD=add, N=pow2(n), num_warps=8)
    return total,rstd

@functools.cache
def _norm_mean_kernel():
    "Of each row the mean of g·w·t, and z over the RMS."
    import triton, triton.language as tl
    @triton.jit
    def norm_mean(h, w, rstd, d, xa, mean, z_rms, s, n, R: tl.constexpr, N: tl.constexpr):
        r = tl.program_id(0).to(tl.int64)
        c,j = tl.arange(0, N),tl.arange(0, R)
        ok = c<n
        k = tl.load(rstd+r)
        t = tl.load(h+r*n+c, mask=ok, other=0.).to(tl.float32)*tl.load(w+c, mask=ok, other=0.).to(tl.float32)*k
        z = tl.load(d+r*s+n+j).to(tl.float32)
        m = tl.sum(t*tl.load(d+r*s+c, mask=ok, other=0.).to(tl.float32), 0)
        m += tl.sum(z*tl.load(xa+r*R+j).to(tl.float32), 0)
        tl.store(mean+r, m/n)
        tl.store(z_rms+r*R+j, z*k)
    return norm_mean

@functools.cache
def _norm_back_kernel():
    "The gradient of what was normalised, with the one that went past the block."
    import triton, triton.language as tl
    @triton.jit(do_not_specialize=['rows'])
    def norm_back(h, w, rstd, d, a, mean, skip, dh, s, rows, n,
                  R: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr):
        r = tl.program_id(0)*ROWS + tl.arange(0, ROWS)
        here = (r<rows)[:,None]
        r = r.to(tl.int64)[:,None]
        c = (tl.program_id(1)*N + tl.arange(0, N))[None,:]
        ok = here & (c<n)
        k,m = tl.load(rstd+r, mask=here, other=0.),tl.load(mean+r, mask=here, other=0.)
        g = tl.zeros((ROWS,N), tl.float32)
        for i in range(0, R, RANKS):
            b = i + tl.arange(0, RANKS)
            z = tl.load(d+r*s+n+b[None,:], mask=here, other=0.)
            g = tl.dot(z, tl.load(a+b[:,None]*n+c, mask=c<n, other=0.), g)
        g += tl.load(d+r*s+c, mask=ok, other=0.).to(tl.float32)
        t = tl.load(h+r*n+c, mask=ok, other=0.).to(tl.float32)*k
        dx = k*(g*tl.load(w+c, mask=c<n, other=0.).to(tl.float32) - t*m)
        tl.store(dh+r*n+c, dx + tl.load(skip+r*n+c, mask=ok, other=0.).to(tl.float32), mask=ok)
    return norm_back

def norm_back(
    h, # What was normalised, (rows, hidden)
    rstd, # One over the RMS of its rows
    norm, # Module with `weight`
    d, # Gradient of the product's input, (rows, hidden+rank)
    a, # `lora_A`, (rank, hidden)
    xa, # What it made of the norm, (rows, rank)
    skip, # Gradient that went past the block
)->tuple: # Gradient of `h`, and that of `xa` over the RMS
    "Back through `lora_A`, the norm and the sum."
    import torch
    rows,n = h.shape
    dh,mean,z_rms = torch.empty_like(h),torch.empty_like(rstd),torch.empty_like(xa)
    if not rows: return dh,z_rms
    R,s,w = len(a),d.stride(0),norm.weight
    _norm_mean_kernel()[(rows,)](h, w, rstd, d, xa, mean, z_rms, s, n, R=R, N=pow2(n), num_warps=8)
    grid,sides = (-(-rows//32), -(-n//128)),dict(RANKS=min(R, 64), ROWS=32, N=128)
    _norm_back_kernel()[grid](h, w, rstd, d, a, mean, skip, dh, s, rows, n, R=R, **sides, num_warps=4)
    return dh,z_rms

@functools.cache
def _swiglu_kernel():
    "act(gate)·up; a program takes 2,048 columns of a row."
    import triton, triton.language as tl
    @triton.jit
    def swiglu(gu, x, s, n, GELU: tl.constexpr, N: tl.constexpr):
        r = tl.program_id(0).to(tl.int64)
        c = tl.program_id(1)*N + tl.arange(0, N)
        ok = c<n
        g = tl.load(gu+r*2*n+c, mask=ok, other=0.).to(tl.float32)
        u = tl.load(gu+r*2*n+n+c, mask=ok, other=0.).to(tl.float32)
        k = 1.5957691216057308*(g + .044715*g*g*g) if GELU else g
        tl.store(x+r*s+c, (g*tl.sigmoid(k)).to(tl.bfloat16).to(tl.float32)*u, mask=ok)
    return swiglu

def swiglu(
    gu, # Gate and up, (rows, 2·width)
    x, # Buffer, (rows, width+rank): its left part becomes act(gate)·up
    gelu:bool=False, # act is the tanh form of GELU; else SiLU
):
    "What the down projection reads."
    n = gu.shape[1]//2
    if len(gu): _swiglu_kernel()[(len(gu), -(-n//2048))](gu, x, x.stride(0), n, GELU=gelu, N=2048)

@functools.cache
def _swiglu_back_kernel():
    "Gradients of gate and up in their place, and sums for three of the adapters' gradients."
    import triton, triton.language as tl
    @triton.jit(do_not_specialize=['rows','each'])
    def swiglu_back(gu, d, a, xa, grads, s, s_xa, rows, each, n, GELU: tl.constexpr, UP: tl.constexpr,
                    RANK: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr):
        j,c = tl.arange(0, R),tl.program_id(0)*N + tl.arange(0, N)
        low = tl.load(a+j[:,None]*n+c[None,:], mask=(c<n)[None,:], other=0.)
        grad_a,grad_g,grad_u = tl.zeros((R,N), tl.float32),tl.zeros((R,N), tl.float32),tl.zeros((R,N), tl.float32)
        first = tl.program_id(1)*each
        for i in range(first, min(first+each, rows), ROWS):
            r = i + tl.arange(0, ROWS)
            ok = (r<rows)[:,None] & (c<n)[None,:]
            r = r.to(tl.int64)[:,None]
            p = gu+r*2*n+c[None,:]
            g,u = tl.load(p, mask=ok, other=0.).to(tl.float32),tl.load(p+n, mask=ok, other=0.).to(tl.float32)
            z = tl.load(d+r*s+n+j[None,:], mask=r<rows, other=0.)
            dx = tl.dot(z, low) + tl.load(d+r*s+c[None,:], mask=ok, other=0.).to(tl.float32)
            w,slope = tl.sigmoid(g),1.
            if GELU:
                w = tl.sigmoid(1.5957691216057308*(g + .044715*g*g*g))
                slope = 1.5957691216057308*(1 + .134145*g*g)
            x = ((g*w).to(tl.bfloat16).to(tl.float32)*u).to(tl.bfloat16)
            dg,du = (dx*u*w*(1+g*(1-w)*slope)).to(tl.bfloat16),(dx*g*w).to(tl.bfloat16)
            tl.store(p, dg, mask=ok)
            tl.store(p+n, du, mask=ok)
            q = xa+r*s_xa+j[None,:]
            own = (r<rows) & (j<RANK)[None,:]
            grad_a = tl.dot(tl.trans(z), x, grad_a)
            grad_g = tl.dot(tl.trans(tl.load(q, mask=own, other=0.)), dg, grad_g)
            grad_u = tl.dot(tl.trans(tl.load(q+UP, mask=own, other=0.)), du, grad_u)
        p = grads + (tl.program_id(1)*3*R+j)[:,None]*n + c[None,:]
        ok = (c<n)[None,:]
        tl.store(p, grad_a, mask=ok)
        tl.store(p+R*n, grad_g, mask=ok)
        tl.store(p+2*R*n, grad_u, mask=ok)
    return swiglu_back

def swiglu_back(
    gu, # Gate and up; they become their gradients
    d, # Gradient of the product's input, (rows, width+ranks)
    a, # `lora_A` of the down projection, (ranks, width)
    xa, # What gate's and up's `lora_A` had made, (rows, 2·rank or more); (rows, rank or more) where they share one
    rank:int, # Of the adapter
    gelu:bool=False, # As of `swiglu`
    joined:bool=False, # Gate and up are one projection
)->tuple: # Gradients of down's `lora_A`, and of gate's and up's `lora_B`, fp32
    "Back through `lora_A` and SwiGLU, with the gradients of the adapters on both sides of it."
    import torch
    rows,n,R = len(gu),gu.shape[1]//2,len(a)
    each = max(512, 64*-(-rows//1024)) # rows of a program: at most sixteen share a column
    grads = torch.empty(-(-rows//each), 3, R, n, dtype=torch.float32, device=gu.device)
    N = max(16, min(128, 2048//R))
    grid,sides = (-(-n//N), len(grads)),dict(RANK=rank, R=R, ROWS=16, N=N, num_warps=4)
    kind = dict(GELU=gelu, UP=0 if joined else rank)
    strides = d.stride(0),xa.stride(0)
    if rows: _swiglu_back_kernel()[grid](gu, d, a, xa, grads, *strides, rows, each, n, **kind, **sides, num_stages=2)
    a,g,u = grads.sum(0)[:,:rank]
    return a,g.t(),u.t()

@functools.cache
def _rope_kernel():
    "Queries and keys turned in place; a program takes a token."
    import triton, triton.language as tl
    @triton.jit
    def rope(qkv, cos, sin, q_scale, s, heads_q, heads, HALF: tl.constexpr, HEADS: tl.constexpr):
        t = tl.program_id(0).to(tl.int64)
        h,c = tl.arange(0, HEADS)[:,None],tl.arange(0, HALF)[None,:]
        p = qkv + t*s + h*2*HALF + c
        ok = h<heads
        x,y = tl.load(p, mask=ok, other=0.).to(tl.float32),tl.load(p+HALF, mask=ok, other=0.).to(tl.float32)
        k = tl.where(h<heads_q, tl.load(q_scale+t), 1.)
        u,v = tl.load(cos+t*2*HALF+c).to(tl.float32)*k,tl.load(sin+t*2*HALF+c).to(tl.float32)*k
        tl.store(p, x*u-y*v, mask=ok)
        tl.store(p+HALF, y*u+x*v, mask=ok)
    return rope

def rope(
    qkv, # (tokens, (heads_q+2·heads_k)·head_dim): queries, keys, values; the first two are turned in place
    turn:tuple, # `cos` and `sin`, (tokens, head_dim), and what queries are multiplied by, (tokens,)
    heads:tuple, # Query heads, key heads, head_dim
):
    "Rotary position embedding."
    q,k,d = heads
    _rope_kernel()[(len(qkv),)](qkv, *turn, qkv.stride(0), q, q+k, HALF=d//2, HEADS=pow2(q+k), num_warps=8)

LOG2E = 1.4426950408889634 # log2(e): exp(x) is exp2(x·LOG2E), and exp2 is what GPUs have

TILE = 64 # rows of a document that a program of the attention kernels takes

def attention_tiles(
    sizes:list, # Tokens of each document, in order
)->list: # Of each program: a tile of queries, its document's first row and end; a tile of keys, its document's end
    "Cut documents into tiles: queries with the longest document first, keys with most behind them first."
    from itertools import accumulate
    docs = zip(sizes, accumulate(sizes, initial=0))
    queries = [(t,a,a+n) for n,a in sorted(docs, key=lambda d: -d[0]) for t in range(a, a+n, TILE)]
    keys = sorted(((t,end) for t,_,end in queries), key=lambda k: k[0]-k[1])
    return [q+k for q,k in zip(queries, keys)]

@functools.cache
def _attend_kernel():
    "Flash attention forward; a program takes a tile of queries of one head."
    import triton, triton.language as tl
    @triton.jit
    def attend(qkv, out, lse, tiles, s, s_o, total, scale,
               HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
               CAP: tl.constexpr, WINDOW: tl.constexpr):
        h,i = tl.program_id(0),tl.program_id(1)
        start,first,end = tl.load(tiles+5*i),tl.load(tiles+5*i+1),tl.load(tiles+5*i+2)
        if WINDOW: first = tl.maximum(first, start-WINDOW+1)
        r,c = start + tl.arange(0, N),tl.arange(0, D)[None,:]
        here = (r<end)[:,None]
        q = tl.load(qkv + r.to(tl.int64)[:,None]*s + h*D + c, mask=here, other=0.)
        m,l,o = tl.full((N,), -float('inf'), tl.float32),tl.zeros((N,), tl.float32),tl.zeros((N,D), tl.float32)
        own = start - (start-first)%M
        for edge in tl.static_range(2): # keys before the tile, which all of its queries see; then those that some do
            for n in range(own if edge else first, start+N if edge else own, M):
                j = n + tl.arange(0, M)
                p = qkv + j.to(tl.int64)[:,None]*s + (HQ+h//(HQ//HK))*D + c
                ok = (j<end)[:,None]
                k,v = tl.load(p, mask=ok, other=0.),tl.load(p+HK*D, mask=ok, other=0.)
                z = tl.dot(q, tl.trans(k))*scale
                if CAP>0: z = CAP*(2*tl.sigmoid(z*(2/CAP))-1)
                if edge or WINDOW:
                    seen = (r[:,None]>=j[None,:]) & (j<end)[None,:]
                    if WINDOW: seen = seen & (r[:,None]-j[None,:]<WINDOW)
                    z = tl.where(seen, z, -float('inf'))
                top = tl.maximum(m, tl.max(z, 1))
                base = tl.where(top>-float('inf'), top, 0.) if WINDOW else top
                e,a = tl.exp2(z-base[:,None]),tl.exp2(m-base)
                l = l*a + tl.sum(e, 1)
                o = tl.dot(e.to(tl.bfloat16), v, o*a[:,None])
                m = top
        if WINDOW: l = tl.where(r<end, l, 1.) # rows beyond the document may see nothing
        tl.store(out + r.to(tl.int64)[:,None]*s_o + h*D + c, o/l[:,None], mask=here)
        tl.store(lse + h.to(tl.int64)*total + r, m+tl.log2(l), mask=r<end)
    return attend

def attend(
    qkv, # After `rope`
    o, # Buffer, (tokens, heads_q·head_dim+rank): its left part becomes the output
    tiles, # From `attention_tiles`, an int32 tensor
    heads:tuple, # Query heads, key heads, head_dim
    scale:float, # Of the scores
    cap:float=0., # Scaled scores s become cap·tanh(s/cap); 0 for none
    window:int=0, # Tokens that a query sees, itself one of them; 0 for all
): # log2 of the sum of exponentials of each row's scores, (heads_q, tokens)
    "Causal attention within documents; see https://arxiv.org/abs/2307.08691."
    import torch
    q,k,d = heads
    lse = torch.empty(q, len(qkv), dtype=torch.float32, device=qkv.device)
    sizes,sides = (qkv.stride(0), o.stride(0), len(qkv)),dict(HQ=q, HK=k, D=d, N=TILE, M=32, CAP=cap*LOG2E, WINDOW=window)
    _attend_kernel()[(q, len(tiles))](qkv, o, lse, tiles, *sizes, scale*LOG2E, **sides, num_warps=4, num_stages=2)
    return lse

@functools.cache
def _attend_dq_kernel():
    "Complete the output's gradient, and make the queries'; a program takes a tile of queries of one head."
    import triton, triton.language as tl
    @triton.jit
    def attend_dq(qkv, o, d, a, lse, delta, cos, sin, q_scale, dqkv, tiles, s, s_d, total, scale, LOG2E: tl.constexpr,
                  HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr,
                  R: tl.constexpr, RANKS: tl.constexpr, N: tl.constexpr, M: tl.constexpr):
        h,i = tl.program_id(0),tl.program_id(1)
        start,first,end = tl.load(tiles+5*i),tl.load(tiles+5*i+1),tl.load(tiles+5*i+2)
        r,c,f = start + tl.arange(0, N),tl.arange(0, D)[None,:],tl.arange(0, D//2)[None,:]
        here = (r<end)[:,None]
        row = r.to(tl.int64)[:,None]
        at_d = row*s_d+h*D+c
        g = tl.zeros((N,D), tl.float32)
        for i in range(0, R, RANKS):
            b = i + tl.arange(0, RANKS)
            g = tl.dot(tl.load(d+row*s_d+HQ*D+b[None,:], mask=here, other=0.), tl.load(a+b[:,None]*HQ*D+h*D+c), g)
        g = (g + tl.load(d+at_d, mask=here, other=0.).to(tl.float32)).to(tl.bfloat16)
        mean = tl.sum(g.to(tl.float32)*tl.load(o+at_d, mask=here, other=0.).to(tl.float32), 1)
        at = h.to(tl.int64)*total+r
        tl.store(d+at_d, g, mask=here)
        tl.store(delta+at, mean, mask=r<end)
        q,top = tl.load(qkv+row*s+h*D+c, mask=here, other=0.),tl.load(lse+at, mask=r<end, other=0.)
        dq = tl.zeros((N,D), tl.float32)
        if WINDOW: first = tl.maximum(first, start-WINDOW+1)
        own = start - (start-first)%M
        for edge in tl.static_range(2): # as above
            for n in range(own if edge else first, start+N if edge else own, M):
                j = n + tl.arange(0, M)
                p = qkv + j.to(tl.int64)[:,None]*s + (HQ+h//(HQ//HK))*D + c
                ok = (j<end)[:,None]
                k,v = tl.load(p, mask=ok, other=0.),tl.load(p+HK*D, mask=ok, other=0.)
                z,slope = tl.dot(q, tl.trans(k))*(scale*LOG2E),1.
                if CAP>0:
                    t = 2*tl.sigmoid(z*(2/CAP))-1
                    z,slope = CAP*t,1-t*t
                e = tl.exp2(z - top[:,None])
                if edge or WINDOW:
                    seen = (r[:,None]>=j[None,:]) & (j<end)[None,:]
                    if WINDOW: seen = seen & (r[:,None]-j[None,:]<WINDOW)
                    e = tl.where(seen, e, 0.)
                dq = tl.dot((e*(tl.dot(g, tl.trans(v)) - mean[:,None])*slope).to(tl.bfloat16), k, dq)
        dq *= (scale*tl.load(q_scale+r, mask=r<end, other=0.))[:,None]
        x,y = tl.split(tl.permute(tl.reshape(dq, (N,2,D//2)), (0,2,1))) # halves
        u = tl.load(cos+row*D+f, mask=here, other=0.).to(tl.float32)
        v = tl.load(sin+row*D+f, mask=here, other=0.).to(tl.float32)
        p = dqkv + row*s + h*D + f
        tl.store(p, x*u+y*v, mask=here)
        tl.store(p+D//2, y*u-x*v, mask=here)
    return attend_dq

@functools.cache
def _attend_dkv_kernel():
    "Gradients of keys and values; a program takes a tile of keys of one key head."
    import triton, triton.language as tl
    @triton.jit
    def attend_dkv(qkv, d, lse, delta, cos, sin, dqkv, tiles, s, s_d, total, scale, LOG2E: tl.constexpr,
                   HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr,
                   N: tl.constexpr, M: tl.constexpr):
        b,i = tl.program_id(0),tl.program_id(1)
        start,end = tl.load(tiles+5*i+3),tl.load(tiles+5*i+4)
        j,c,f = start + tl.arange(0, N),tl.arange(0, D)[None,:],tl.arange(0, D//2)[None,:]
        here = (j<end)[:,None]
        row = j.to(tl.int64)[:,None]
        p = qkv + row*s + (HQ+b)*D + c
        k,v = tl.load(p, mask=here, other=0.),tl.load(p+HK*D, mask=here, other=0.)
        dk,dv = tl.zeros((N,D), tl.float32),tl.zeros((N,D), tl.float32)
        last = tl.minimum(end, start+N+WINDOW-1) if WINDOW else end
        for edge in tl.static_range(2): # queries behind the tile, then those that don't see all of it
            begin = start if edge else start+N
            steps = tl.cdiv(tl.minimum(last, start+N)-start if edge else tl.maximum(last-begin, 0), M)
            for i in range(0, steps*(HQ//HK)): # one loop, so that loads run ahead from head to head
                h,r = b*(HQ//HK) + i//steps,begin + i%steps*M + tl.arange(0, M)
                ok = (r<end)[:,None]
                at = r.to(tl.int64)[:,None]
                q,g = tl.load(qkv+at*s+h*D+c, mask=ok, other=0.),tl.load(d+at*s_d+h*D+c, mask=ok, other=0.)
                top,mean = tl.load(lse+h*total+r, mask=r<end, other=0.),tl.load(delta+h*total+r, mask=r<end, other=0.)
                z,slope = tl.dot(k, tl.trans(q))*(scale*LOG2E),1.
                if CAP>0:
                    t = 2*tl.sigmoid(z*(2/CAP))-1
                    z,slope = CAP*t,1-t*t
                e = tl.exp2(z - top[None,:])
                if edge or WINDOW:
                    seen = r[None,:]>=j[:,None]
                    if WINDOW: seen = seen & (r[None,:]-j[:,None]<WINDOW)
                    e = tl.where(seen, e, 0.)
                dv = tl.dot(e.to(tl.bfloat16), g, dv) # behind the document's end g is 0
                dk = tl.dot((e*(tl.dot(v, tl.trans(g)) - mean[None,:])*slope).to(tl.bfloat16), q, dk)
        x,y = tl.split(tl.permute(tl.reshape(dk*scale, (N,2,D//2)), (0,2,1))) # halves
        u = tl.load(cos+row*D+f, mask=here, other=0.).to(tl.float32)
        v = tl.load(sin+row*D+f, mask=here, other=0.).to(tl.float32)
        p = dqkv + row*s + (HQ+b)*D
        tl.store(p+f, x*u+y*v, mask=here)
        tl.store(p+D//2+f, y*u-x*v, mask=here)
        tl.store(p+HK*D+c, dv, mask=here)
    return attend_dkv

def attend_bwd(
    qkv, # After `rope`
    o, # Output of `attend`
    lse, # Its other one
    d, # Gradient of the product's input, (tokens, heads_q·head_dim+rank)
    a, # `lora_A` of the output projection, (rank, heads_q·head_dim)
    turn:tuple, # As for `rope`
    tiles, # As for `attend`
    heads:tuple, # Query heads, key heads, head_dim
    scale:float, # Of the scores
    cap:float=0., # As of `attend`
    window:int=0, # As of `attend`
): # Gradient of `qkv` before `rope`
    "Back through `lora_A`, attention and position."
    import torch
    q,k,n = heads
    delta,out = torch.empty_like(lse),torch.empty_like(qkv)
    rest = out,tiles,qkv.stride(0),d.stride(0),len(qkv),scale
    shape = dict(LOG2E=LOG2E, HQ=q, HK=k, D=n, N=TILE, CAP=cap*LOG2E, WINDOW=window, num_warps=4)
    keys,queries,stages = (64,32,3) if n<=128 else (16,16,2) # of a step: heads of 256 fit the smallest card, too
    ranks = dict(R=len(a), RANKS=min(len(a), 64))
    _attend_dq_kernel()[(q, len(tiles))](qkv, o, d, a, lse, delta, *turn, *rest, **shape, **ranks, M=keys, num_stages=2)
    _attend_dkv_kernel()[(k, len(tiles))](qkv, d, lse, delta, *turn[:2], *rest, **shape, M=queries, num_stages=stages)
    return out

@functools.cache
def _unpack_kernel():
    "The first programs take the weights, the others `lora_B`."
    import triton, triton.language as tl
    @triton.jit
    def unpack(packed, absmax, code, b, out, n_bytes, rows, end1, end2, k, s,
               RANK: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
        i,blocks = tl.program_id(0),tl.cdiv(n_bytes, BLOCK)
        if i<blocks:
            at = i*BLOCK + tl.arange(0, BLOCK)
            inside = at<n_bytes
            x = tl.load(packed+at, mask=inside, other=0).to(tl.int32)
            scale = tl.load(absmax + at//32, mask=inside, other=0.)
            v = tl.interleave(tl.load(code + (x>>4))*scale, tl.load(code + (x&15))*scale)
            e = i*BLOCK*2 + tl.arange(0, BLOCK*2)
            tl.store(out + (e//k)*s + e%k, v.to(tl.bfloat16), mask=e<n_bytes*2)
        else:
            r = ((i-blocks)*ROWS + tl.arange(0, ROWS))[:,None]
            own = RANK*((r>=end1).to(tl.int32)+(r>=end2).to(tl.int32))
            j = tl.arange(0, R)[None,:]-own
            up = tl.load(b + r*RANK + j, mask=(r<rows) & (j>=0) & (j<RANK), other=0.)
            tl.store(out + r*s + k + j+own, up, mask=r<rows)
    return unpack

def unpack(
    packed, # Weights of up to three projections under one another, two a byte
    absmax, # Scale of each block of 64 weights
    code, # The 16 steps of NF4
    b, # Their `lora_B` under one another, (rows, rank), bf16
    ends:list, # Row after each projection but the last
    out, # Buffer, (rows, width+ranks)
): # The buffer
    "Weights, and `lora_B` beside them."
    n,rows,k = packed.numel(),len(b),packed.numel()*2//len(b)
    end1,end2 = [*ends, rows, rows][:2]
    R = out.shape[1]-k
    ROWS = max(1, min(64, 4096//R)) # `lora_B` is taken so many rows at a time
    grid,sides = (-(-n//1024)+-(-rows//ROWS),),dict(RANK=b.shape[1], R=R, BLOCK=1024, ROWS=ROWS)
    _unpack_kernel()[grid](packed, absmax, code, b, out, n, rows, end1, end2, k, out.stride(0), **sides)
    return out

def rows_in_fp8(
    w, # (rows, columns)
)->tuple: # The rows in fp8, and their scales, (rows, 1)
    "What `quantise` does, on any machine."
    import torch
    top = w.float().abs().amax(1, keepdim=True).clamp(min=1e-30)
    return (w.float()*(448/top)).to(torch.float8_e4m3fn),top/448

@functools.cache
def _quantise_kernel():
    "A row over its scale, in fp8; a program keeps N columns, and reads those beyond them twice."
    import triton, triton.language as tl
    @triton.jit
    def quantise(x, by, xa, share, q, scale, s, n, BY: tl.constexpr, R: tl.constexpr, N: tl.constexpr):
        r,c = tl.program_id(0).to(tl.int64),tl.arange(0, N)
        first = tl.load(x+r*s+c, mask=c<n, other=0.).to(tl.float32)
        if BY: first *= tl.load(by+c, mask=c<n, other=0.)
        m = tl.abs(first)
        for i in range(N, n, N):
            v = tl.load(x+r*s+i+c, mask=i+c<n, other=0.).to(tl.float32)
            if BY: v *= tl.load(by+i+c, mask=i+c<n, other=0.)
            m = tl.maximum(m, tl.abs(v))
        top = tl.maximum(tl.max(m, 0), 1e-30) # a row may be all zeros
        q += r*(n+3*R)
        if R:
            j = tl.arange(0, R)
            u = tl.load(xa+r*R+j).to(tl.float32)*tl.load(share)
            top = tl.maximum(top, tl.max(tl.abs(u), 0))
            u *= 448/top
            high = u.to(tl.float8e4nv)
            tl.store(q+n+j, high)
            tl.store(q+n+R+j, (u-high.to(tl.float32)).to(tl.float8e4nv))
            tl.store(q+n+2*R+j, high)
        tl.store(scale+r, top/448)
        tl.store(q+c, (first*(448/top)).to(tl.float8e4nv), mask=c<n)
        for i in range(N, n, N):
            v = tl.load(x+r*s+i+c, mask=i+c<n, other=0.).to(tl.float32)
            if BY: v *= tl.load(by+i+c, mask=i+c<n, other=0.)
            tl.store(q+i+c, (v*(448/top)).to(tl.float8e4nv), mask=i+c<n)
    return quantise

def quantise(
    x, # (rows, columns), bf16
    by=None, # What each column is multiplied by first, fp32
    xa=None, # What `lora_A` made of the rows, (rows, ranks)
    share=None, # What it is multiplied by, from `two_parts`
)->tuple: # The rows in fp8, beside them `xa` rounded, its rest, and rounded again; and their scales, (rows, 1)
    "Rows of fp8, each with a scale."
    import torch
    (rows,n),R = x.shape,0 if xa is None else xa.shape[1]
    q = torch.empty(rows, n+3*R, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    sides = dict(BY=by is not None, R=R, N=1024 if n<=8192 else 2048, num_warps=4 if n<=16384 else 8)
    if rows: _quantise_kernel()[(rows,)](x, by, xa, share, q, scale, x.stride(0), n, **sides)
    return q,scale

def two_parts(
    b, # `lora_B` of layers over the scales of their rows, (layers, rows, ranks), fp32
)->tuple: # (layers, rows, 3·ranks) in fp8: rounded, again, and the rest; what the other side is multiplied by, (layers,)
    "Numbers as the sum of two in fp8."
    import torch
    share = b.abs().amax((1,2), keepdim=True).clamp(min=1e-30)/448
    high = (b/share).to(torch.float8_e4m3fn)
    low = (b/share-high.float()).to(high.dtype)
    return torch.cat([t.view(torch.uint8) for t in (high,high,low)], 2).view(high.dtype),share.flatten()

@functools.cache
def _unpack8_kernel():
    "NF4 in fp8; a program takes 64 rows and 128 columns."
    import triton, triton.language as tl
    @triton.jit
    def unpack8(packed, absmax, code, scale, out, rows, k, s, TURNED: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr):
        r = (tl.program_id(0)*ROWS + tl.arange(0, ROWS)).to(tl.int64)[:,None]
        b = (tl.program_id(1)*BYTES + tl.arange(0, BYTES))[None,:]
        ok = (r<rows) & (b<k//2)
        x = tl.load(packed + r*(k//2)+b, mask=ok, other=0).to(tl.int32)
        by = tl.load(absmax + r*(k//64)+b//32, mask=ok, other=0.)*(1/tl.load(scale+r, mask=r<rows, other=1.))
        v = tl.interleave(tl.load(code + (x>>4))*by, tl.load(code + (x&15))*by).to(tl.float8e4nv)
        c = (tl.program_id(1)*BYTES*2 + tl.arange(0, BYTES*2))[None,:]
        if TURNED: tl.store(out + c.to(tl.int64)*s+r, v, mask=(r<rows) & (c<k))
        else: tl.store(out + r*s+c, v, mask=(r<rows) & (c<k))
    return unpack8

def unpack8(
    packed, # Weights of projections under one another, two a byte
    absmax, # Scale of each block of 64 weights
    code, # The 16 steps of NF4
    scale, # Of each row in fp8, (rows, 1)
    out, # Buffer in fp8, (rows, columns or more), or turned, (columns, rows)
    turned:bool=False, # Columns as rows
): # The buffer
    "Weights in fp8."
    rows = len(scale)
    k = packed.numel()*2//rows
    sides = dict(TURNED=turned, ROWS=64, BYTES=64, num_warps=8)
    _unpack8_kernel()[-(-rows//64),-(-k//128)](packed, absmax, code, scale, out, rows, k, out.stride(0), **sides)
    return out

def rotated_block(
    n:int, # Columns, in whole blocks of 64
)->int: # 128 or 64
    "How many columns are rotated together."
    return 64 if n%128 else 128

@functools.cache
def rotation(
    n:int, # A power of two
    device, # Where it is wanted
): # (n, n), bf16: 1 and −1
    "Hadamard's matrix: symmetric, and √n times an orthogonal one."
    import torch
    h = torch.ones(1, 1)
    while len(h)<n: h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h.to(device, torch.bfloat16)

def rotate(
    x, # (…, columns), in whole blocks of 64
): # fp32
    "Rotate columns, on any machine."
    n = rotated_block(x.shape[-1])
    return (x.float().unflatten(-1, (-1,n))@(rotation(n, x.device).float()*n**-.5)).flatten(-2)

@functools.cache
def _rotate8_kernel():
    "Rows rotated, each over its scale, in int8; a program takes ROWS rows of TILES times BLOCKS blocks, or fewer."
    import triton, triton.language as tl
    @triton.jit(do_not_specialize=['rows'])
    def rotate8(x, turn, q, scale, s, rows, n, ROWS: tl.constexpr, BLOCKS: tl.constexpr, TILES: tl.constexpr, H: tl.constexpr):
        h,i = tl.arange(0, H),tl.arange(0, ROWS*BLOCKS)
        r = (tl.program_id(0)*ROWS + i//BLOCKS).to(tl.int64)[:,None]
        turn = tl.load(turn+h[:,None]*H+h[None,:])
        top = tl.full((ROWS,), 1e-30, tl.float32) # a row may be all zeros
        for t in tl.static_range(2*TILES-1):
            c = (t%TILES*BLOCKS + i%BLOCKS)[:,None]*H + h[None,:]
            ok = (r<rows) & (c<n)
            v = tl.dot(tl.load(x+r*s+c, mask=ok, other=0.), turn)
            if t<TILES: top = tl.maximum(top, tl.max(tl.reshape(tl.max(tl.abs(v), 1), (ROWS,BLOCKS)), 1))
            if t>=TILES-1:
                v *= tl.reshape(tl.broadcast_to((127/top)[:,None], (ROWS,BLOCKS)), (ROWS*BLOCKS,))[:,None]
                tl.store(q+r*n+c, (v + tl.where(v<0, -.5, .5)).to(tl.int8), mask=ok)
        r = tl.program_id(0)*ROWS + tl.arange(0, ROWS)
        tl.store(scale+r, top/127, mask=r<rows)
    return rotate8

def rotate8(
    x, # (rows, columns), bf16, columns in whole blocks of 64
)->tuple: # The rows, rotated and √128 or √64 times as large, in int8; and their scales, (rows, 1)
    "Rotated rows of int8, each with a scale."
    import torch
    (rows,n),H = x.shape,rotated_block(x.shape[1])
    q = torch.empty(rows, n, dtype=torch.int8, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    blocks = min(pow2(n//H, 1), 256) # of a tile: more don't fit a card's fast memory
    ROWS = max(1, 64//blocks)
    sides = dict(ROWS=ROWS, BLOCKS=blocks, TILES=-(-n//(blocks*H)), H=H, num_warps=max(4, blocks//16))
    if rows: _rotate8_kernel()[(-(-rows//ROWS),)](x, rotation(H, x.device), q, scale, x.stride(0), rows, n, **sides)
    return q,scale

def rotated_scales(
    w, # Weights, (rows, columns), each in whole blocks of 64
)->tuple: # (rows, 1), and of the columns, (columns, 1)
    "Scales of weights rotated along their rows, and along their columns."
    return tuple(rotate(t).abs().amax(1, keepdim=True).clamp(min=1e-30)*(rotated_block(t.shape[1])**.5/127) for t in (w, w.t()))

@functools.cache
def _pack8_kernel():
    "NF4 rotated, in int8; a program takes a block of H rows, or 64, and of 64 columns, or H."
    import triton, triton.language as tl
    @triton.jit
    def pack8(packed, absmax, code, turn, scale, out, k, s, TURNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
        r = (tl.program_id(0)*ROWS + tl.arange(0, ROWS)).to(tl.int64)[:,None]
        b = (tl.program_id(1)*(COLS//2) + tl.arange(0, COLS//2))[None,:]
        c = (tl.program_id(1)*COLS + tl.arange(0, COLS))[None,:]
        x = tl.load(packed + r*(k//2)+b).to(tl.int32)
        by = tl.load(absmax + r*(k//64)+b//32)
        v = tl.interleave(tl.load(code + (x>>4))*by, tl.load(code + (x&15))*by).to(tl.bfloat16)
        H: tl.constexpr = ROWS if TURNED else COLS
        h = tl.arange(0, H)
        turn = tl.load(turn+h[:,None]*H+h[None,:])
        v = tl.dot(turn, v)/tl.load(scale+c) if TURNED else tl.dot(v, turn)/tl.load(scale+r)
        v = (v + tl.where(v<0, -.5, .5)).to(tl.int8)
        tl.store(out + c.to(tl.int64)*s+r if TURNED else out + r*s+c, v)
    return pack8

def pack8(
    packed, absmax, code, # As for `unpack8`
    scale, # Of the rows, or of the columns, from `rotated_scales`
    shape:tuple, # Rows and columns of the weights
    turned:bool=False, # Columns as rows, rotated along the columns
): # (rows, columns), or (columns, rows)
    "Rotated weights in int8."
    import torch
    (rows,k),H = shape,rotated_block(shape[0 if turned else 1])
    out = torch.empty((k,rows) if turned else (rows,k), dtype=torch.int8, device=packed.device)
    ROWS,COLS = (H,64) if turned else (64,H)
    turn = rotation(H, packed.device)
    _pack8_kernel()[rows//ROWS,k//COLS](packed, absmax, code, turn, scale, out, k, out.stride(0), TURNED=turned, ROWS=ROWS, COLS=COLS, num_warps=4)
    return out

@functools.cache
def _product8_kernel():
    "Rows of int8 times rows of int8, over their scales, and an adapter's share."
    import triton, triton.language as tl
    @triton.jit(do_not_specialize=['rows'])
    def product8(a, a_scale, b, b_scale, xa, up, out, s, rows, cols, n, H: tl.constexpr, R: tl.constexpr, RANKS: tl.constexpr,
                 M: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr):
        across = tl.cdiv(cols, N)
        group,i = tl.program_id(0)//(GROUP*across),tl.program_id(0)%(GROUP*across) # neighbours share what they read
        high = min(tl.cdiv(rows, M)-group*GROUP, GROUP)
        r,c = (group*GROUP+i%high)*M + tl.arange(0, M),i//high*N + tl.arange(0, N)
        at,to = (r%rows).to(tl.int64)[:,None],(c%cols).to(tl.int64)[:,None] # what is beyond the end isn't stored
        k,j = tl.arange(0, H)[None,:],tl.arange(0, RANKS)[None,:]
        total = tl.zeros((M,N), tl.int32)
        for i in range(0, n, H):
            total = tl.dot(tl.load(a+at*n+i+k), tl.trans(tl.load(b+to*n+i+k)), total, out_dtype=tl.int32)
        y = total.to(tl.float32)*(tl.load(a_scale+r%rows)/H)[:,None]*tl.load(b_scale+c%cols)[None,:]
        if R:
            for i in range(0, R, RANKS): y = tl.dot(tl.load(xa+at*R+i+j), tl.trans(tl.load(up+to*R+i+j)), y)
        tl.store(out+r.to(tl.int64)[:,None]*s+c[None,:], y, mask=(r<rows)[:,None] & (c<cols)[None,:])
    return product8

@functools.cache
def _product8_sides():
    "Tiles for this card: a Hopper has 227 KiB for them, an A10G or an RTX PRO 99."
    import torch
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0]==9
    return dict(M=128, N=256, num_warps=8, num_stages=3) if hopper else dict(M=128, N=128, num_warps=4, num_stages=3)

def product8(
    a, a_scale, # From `rotate8`, (rows, n)
    b, b_scale, # From `pack8`, (columns, n), and its scales
    out, # Buffer, (rows, columns), bf16
    xa=None, # What `lora_A` made of the rows, (rows, ranks)
    up=None, # `lora_B`, (columns, ranks)
): # The buffer
    "The product of rotated rows, and what an adapter adds."
    (rows,n),cols,R = a.shape,len(b),0 if xa is None else xa.shape[1]
    sides = dict(_product8_sides(), H=rotated_block(n), R=R, RANKS=max(16, min(R, 64)), GROUP=8)
    grid = -(-rows//sides['M'])*-(-cols//sides['N']),
    if rows: _product8_kernel()[grid](a, a_scale, b, b_scale, xa, up, out, out.stride(0), rows, cols, n, **sides)
    return out

@functools.cache
def _nll_kernel():
    "Loss and gradient of a row; a program reads it twice, 4,096 logits at a time."
    import triton, triton.language as tl
    @triton.jit
    def nll(z, targets, loss, dz, n, N: tl.constexpr):
        r = tl.program_id(0).to(tl.int64)
        t = tl.load(targets+r)
        m,l = tl.full((N,), -1e38, tl.float32),tl.zeros((N,), tl.float32)
        for i in range(0, n, N):
            c = i + tl.arange(0, N)
            v = tl.load(z+r*n+c, mask=c<n, other=-1e38)
            top = tl.maximum(m, v)
            l = l*tl.exp(m-top) + tl.exp(v-top)
            m = top
        top = tl.max(m, 0)
        lse = top + tl.log(tl.sum(l*tl.exp(m-top), 0))
        tl.store(loss+r, lse - tl.load(z+r*n+t))
        for i in range(0, n, N):
            c = i + tl.arange(0, N)
            p = tl.exp(tl.load(z+r*n+c, mask=c<n, other=-1e38)-lse)
            tl.store(dz+r*n+c, tl.where(c==t, p-1, p), mask=c<n)
    return nll

def nll_rows(
    z, # Logits, (rows, vocabulary), fp32
    targets, # The right token of each row
    dtype, # Of the gradient
)->tuple: # Negative log-likelihood of each, in nats, and the gradient of their sum
    "Cross-entropy and its gradient."
    import torch
    rows,n = z.shape
    loss = torch.empty(rows, dtype=torch.float32, device=z.device)
    dz = torch.empty(z.shape, dtype=dtype, device=z.device)
    if rows: _nll_kernel()[(rows,)](z, targets, loss, dz, n, N=min(4096, pow2(n)), num_warps=8)
    return loss,dz

if __name__=='__main__': main()
