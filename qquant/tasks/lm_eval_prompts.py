"""The five tasks as lm-evaluation-harness asks and judges them: its wording, its examples, its reading of answers.

Written from the facts of the task files that lm-eval 0.4.13 ships; tests/lm_eval holds both against each other, string
by string. The harness itself is not needed here: running it is lm_eval_backend.py's. The qwen format's wording is
choices.py's, gsm8k.py's and humaneval.py's.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Literal

from qquant.errors import BadDataError, UsageError
from qquant.tasks.items import LETTERS, Item, Question, TaskSet, Verdict, judge_choices
from qquant.tasks.sandbox import run_untrusted

SHOTS: Mapping[str, int] = {"mmlu": 0, "ceval": 0, "cmmlu": 0, "gsm8k": 5, "humaneval": 0}
"""How many examples lm-eval gives where nothing is asked for. Papers give 5 to the three tasks of choices."""

FEWSHOT_SEED = 1234
"""The seed of lm-eval's command line for drawing examples, which only GSM8K does."""

GSM8K_STOPS = ("Question:", "</s>", "<|im_end|>")
GSM8K_MAX_NEW_TOKENS = 256
"""lm-eval's default for a task that says nothing."""
HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
HUMANEVAL_MAX_NEW_TOKENS = 1024

Gsm8kFilter = Literal["strict-match", "flexible-extract"]
"""lm-eval's two ways to find the number in an answer."""
GSM8K_SCORED: Gsm8kFilter = "strict-match"
"""Which of the two is the score here: the number after "####", as the examples write it. The other one takes the last
thing that looks like a number, which also rewards an answer that never ends."""

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_IGNORED = tuple(re.compile(rule) for rule in (",", r"\$", r"(?s).*#### ", r"\.$"))
"""Removed in this order from answer and truth before they are compared."""

_HEADINGS = {
    "mmlu": "The following are multiple choice questions (with answers) about {}.\n\n",
    "ceval": "以下是中国关于{}的单项选择题，请选出其中的正确答案。\n\n",
    "cmmlu": "以下是关于{}的单项选择题，请直接给出正确答案的选项。\n\n",
}
_ASK = {"mmlu": "Answer:", "ceval": "答案：", "cmmlu": "答案："}

_CEVAL_SUBJECTS = """
accountant 注册会计师, advanced_mathematics 高等数学, art_studies 艺术学, basic_medicine 基础医学,
business_administration 工商管理, chinese_language_and_literature 中国语言文学, civil_servant 公务员,
clinical_medicine 临床医学, college_chemistry 大学化学, college_economics 大学经济学, college_physics 大学物理,
college_programming 大学编程, computer_architecture 计算机组成, computer_network 计算机网络,
discrete_mathematics 离散数学, education_science 教育学, electrical_engineer 注册电气工程师,
environmental_impact_assessment_engineer 环境影响评价工程师, fire_engineer 注册消防工程师,
high_school_biology 高中生物, high_school_chemistry 高中化学, high_school_chinese 高中语文,
high_school_geography 高中地理, high_school_history 高中历史, high_school_mathematics 高中数学,
high_school_physics 高中物理, high_school_politics 高中政治,
ideological_and_moral_cultivation 思想道德修养与法律基础, law 法学, legal_professional 法律职业资格, logic 逻辑学,
mao_zedong_thought 毛泽东思想和中国特色社会主义理论体系概论, marxism 马克思主义基本原理,
metrology_engineer 注册计量师, middle_school_biology 初中生物, middle_school_chemistry 初中化学,
middle_school_geography 初中地理, middle_school_history 初中历史, middle_school_mathematics 初中数学,
middle_school_physics 初中物理, middle_school_politics 初中政治, modern_chinese_history 近代史纲要,
operating_system 操作系统, physician 医师资格, plant_protection 植物保护, probability_and_statistics 概率统计,
professional_tour_guide 导游资格, sports_science 体育学, tax_accountant 税务师, teacher_qualification 教师资格,
urban_and_rural_planner 注册城乡规划师, veterinary_medicine 兽医学
"""
_CMMLU_SUBJECTS = """
agronomy 农学, anatomy 解剖学, ancient_chinese 古汉语, arts 艺术学, astronomy 天文学, business_ethics 商业伦理,
chinese_civil_service_exam 中国公务员考试, chinese_driving_rule 中国驾驶规则, chinese_food_culture 中国饮食文化,
chinese_foreign_policy 中国外交政策, chinese_history 中国历史, chinese_literature 中国文学,
chinese_teacher_qualification 中国教师资格, clinical_knowledge 临床知识, college_actuarial_science 大学精算学,
college_education 大学教育学, college_engineering_hydrology 大学工程水文学, college_law 大学法律,
college_mathematics 大学数学, college_medical_statistics 大学医学统计, college_medicine 大学医学,
computer_science 计算机科学, computer_security 计算机安全, conceptual_physics 概念物理学,
construction_project_management 建设工程管理, economics 经济学, education 教育学, electrical_engineering 电气工程,
elementary_chinese 小学语文, elementary_commonsense 小学常识, elementary_information_and_technology 小学信息技术,
elementary_mathematics 初等数学, ethnology 民族学, food_science 食品科学, genetics 遗传学, global_facts 全球事实,
high_school_biology 高中生物, high_school_chemistry 高中化学, high_school_geography 高中地理,
high_school_mathematics 高中数学, high_school_physics 高中物理学, high_school_politics 高中政治,
human_sexuality 人类性行为, international_law 国际法学, journalism 新闻学, jurisprudence 法理学,
legal_and_moral_basis 法律与道德基础, logical 逻辑学, machine_learning 机器学习, management 管理学,
marketing 市场营销, marxist_theory 马克思主义理论, modern_chinese 现代汉语, nutrition 营养学, philosophy 哲学,
professional_accounting 专业会计, professional_law 专业法学, professional_medicine 专业医学,
professional_psychology 专业心理学, public_relations 公共关系, security_study 安全研究, sociology 社会学,
sports_science 体育学, traditional_chinese_medicine 中医中药, virology 病毒学, world_history 世界历史,
world_religions 世界宗教
"""


def _by_subject(table: str) -> dict[str, str]:
    pairs = (entry.split() for entry in table.replace("\n", " ").split(","))
    return {subject: chinese for subject, chinese in pairs}


CHINESE_SUBJECTS: Mapping[str, Mapping[str, str]] = {
    "ceval": _by_subject(_CEVAL_SUBJECTS),
    "cmmlu": _by_subject(_CMMLU_SUBJECTS),
}
"""Subject -> what the heading calls it, for the tasks whose heading is Chinese."""


def questions(data: TaskSet, *, shots: int) -> list[Question]:
    """Put every item of a task into lm-eval's wording.

    Args:
        data: what files.py read. C-Eval's items are those of its ``val`` files, as in lm-eval's ``ceval-valid``.
        shots: worked examples per question. The tasks of choices take the first ones of the subject's ``dev`` file.
            GSM8K draws them anew for every question, from all training problems, with the harness's own seed: the
            same examples as the harness's where the same file was read. HumanEval has none.

    Returns:
        One question per item, in order.

    Raises:
        UsageError: ``shots`` is negative, or HumanEval's is not 0.
        BadDataError: fewer examples than ``shots``, or a subject that lm-eval does not have.
    """
    if shots < 0:
        raise UsageError(f"the number of examples must not be negative, got {shots}")
    if data.task == "humaneval":
        if shots:
            raise UsageError(f"humaneval is asked without examples in lm-eval's format, got {shots}; leave it at 0")
        return [_humaneval_question(item) for item in data.items]
    if data.task == "gsm8k":
        pool = _enough(data, None, shots)
        # One generator for the whole task, as the harness has it: the n-th question's examples depend on n.
        generator = random.Random(FEWSHOT_SEED)
        return [_gsm8k_question(item, generator.sample(pool, shots) if shots else ()) for item in data.items]
    return [_choice_question(data, item, shots) for item in data.items]


def heading(task: str, subject: str | None) -> str:
    """The line above the examples of a task of choices, with its blank line.

    Raises:
        BadDataError: lm-eval has no such subject, so it has no name for the heading either.
    """
    names = CHINESE_SUBJECTS.get(task)
    if subject is None or (names is not None and subject not in names):
        raise BadDataError(
            f"lm-eval's {task} knows its published subjects only, got {subject!r}; use the published files, or the "
            "qwen prompt format"
        )
    return _HEADINGS[task].format(subject.replace("_", " ") if names is None else names[subject])


def judge(question: Question, *, logprobs: Sequence[float] | None = None, output: str | None = None) -> Verdict:
    """What lm-eval makes of a model's answer.

    Choices: the likeliest letter, of equals the first, whatever the length of its text (the harness's ``acc``). GSM8K:
    ``judge_gsm8k``. HumanEval: the program runs to its end, in our sandbox; the caller has asked whether it may.

    Args:
        question: one of ``questions``'s.
        logprobs: of each choice, in nats, where the question has choices.
        output: what was generated, cut at the stops, where it has none.

    Raises:
        UsageError: HumanEval's code cannot be confined on this machine.
    """
    if question.choices:
        return judge_choices(question, logprobs)
    if output is None:
        raise ValueError("a question without choices is judged by its output, got none")
    if "entry_point" in question.item.extra:
        outcome = run_untrusted(humaneval_program(question, output))
        why = f"{outcome.status}: {outcome.detail}" if outcome.detail else outcome.status
        return Verdict(answer=why, correct=outcome.status == "passed")
    return judge_gsm8k(question, output)


def judge_gsm8k(question: Question, output: str, *, rule: Gsm8kFilter = GSM8K_SCORED) -> Verdict:
    """The number that one of lm-eval's two filters finds, compared as text with the number of the worked answer."""
    found = _found_number(output, rule)
    if found is None:
        return Verdict(answer=None, correct=False)
    answer = compared_text(found)
    return Verdict(answer=answer, correct=answer == compared_text(question.item.extra["answer"]))


def humaneval_program(question: Question, output: str) -> str:
    """The program that decides a HumanEval item: prompt, what was generated, the tests, and the call of the tests."""
    extra = question.item.extra
    return f"{extra['prompt']}{output}\n{extra['test']}\ncheck({extra['entry_point']})"


def compared_text(number: str) -> str:
    """What lm-eval compares of GSM8K: no commas, no dollar signs, nothing up to "#### ", no full stop at the end."""
    for rule in _IGNORED:
        number = rule.sub("", number)
    return number.lower()


def _found_number(output: str, rule: Gsm8kFilter) -> str | None:
    if rule == "strict-match":
        first = _STRICT.search(output)
        return None if first is None else first[1].strip()
    matches = _FLEXIBLE.findall(output)
    # Both branches of the pattern are groups; one of them is empty.
    return "".join(matches[-1]).strip() if matches else None


def _choice_question(data: TaskSet, item: Item, shots: int) -> Question:
    examples = _enough(data, item.group, shots)[:shots]
    return Question(
        id=item.id,
        group=item.group,
        truth=item.truth,
        heading=heading(data.task, item.group),
        shots=tuple(f"{_choice_text(data.task, shot)} {shot.truth}\n\n" for shot in examples),
        body=_choice_text(data.task, item),
        choices=tuple(f" {letter}" for letter in LETTERS),
        item=item,
    )


def _choice_text(task: str, item: Item) -> str:
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, item.choices, strict=True)]
    return "\n".join([item.question.strip(), *lines, _ASK[task]])


def _gsm8k_question(item: Item, examples: Sequence[Item]) -> Question:
    return Question(
        id=item.id,
        group=item.group,
        truth=item.truth,
        heading="",
        shots=tuple(f"Question: {shot.question}\nAnswer: {shot.extra['answer']}\n\n" for shot in examples),
        body=f"Question: {item.question}\nAnswer:",
        stops=GSM8K_STOPS,
        max_new_tokens=GSM8K_MAX_NEW_TOKENS,
        item=item,
    )


def _humaneval_question(item: Item) -> Question:
    return Question(
        id=item.id,
        group=item.group,
        truth=item.truth,
        heading="",
        shots=(),
        body=item.extra["prompt"],
        stops=HUMANEVAL_STOPS,
        max_new_tokens=HUMANEVAL_MAX_NEW_TOKENS,
        item=item,
    )


def _enough(data: TaskSet, group: str | None, shots: int) -> tuple[Item, ...]:
    """The examples of a group, all of them; fewer than ``shots`` is an error."""
    examples = data.shots.get(group, ())
    if len(examples) < shots:
        of = f"subject {group}" if group else data.task
        raise BadDataError(
            f"{shots} examples were asked for and the files of {of} hold {len(examples)}; give fewer, or the folder "
            f"with {'the training problems' if data.task == 'gsm8k' else 'its dev files'} too"
        )
    return examples
