"""A grammar that writes documents of GovReport's shape: a report of an audit, and the summary that follows from it.

GovReport pairs reports of the U.S. Government Accountability Office with their summaries. These have the sections
Background, Findings and Actions, about 160 tokens in all, and a summary of four sentences that names the agency, the first
two findings and the actions. Figures and findings are made up.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

PROMPT = "### Summarize the following text:\n{report}\n### Summary:\n"


class Document(NamedTuple):
    report: str
    summary: str


# agency, program, areas that an audit looks into
TOPICS = (
    ("Department of Housing", "rental aid program", ("vouchers", "landlords", "waiting lists", "home repairs")),
    ("Coast Guard", "cutter program", ("hulls", "spare parts", "crews", "shipyards")),
    ("Forest Service", "wildfire program", ("fuel breaks", "aircraft", "fire roads", "grazing permits")),
    ("Veterans Administration", "clinic program", ("appointments", "nurses", "referrals", "wait times")),
    ("Transit Administration", "bus grant program", ("bus depots", "drivers", "fares", "batteries")),
    ("Customs Service", "port screening program", ("containers", "scanners", "cargo seals", "brokers")),
    ("Department of Education", "student loan program", ("loan servicers", "refunds", "colleges", "borrowers")),
    ("Weather Service", "satellite program", ("launches", "sensors", "ground stations", "forecasts")),
    ("Park Service", "visitor safety program", ("trails", "rangers", "bridges", "rescue boats")),
    ("Bureau of Prisons", "inmate health program", ("doctors", "medicines", "dental care", "hospital beds")),
)
FINDINGS = (
    "officials did not track {area} in {year}",
    "the cost of {area} rose by {percent} percent",
    "{percent} percent of {area} were late in {year}",
    "no office keeps a complete list of {area}",
    "staff at {number} sites had no training on {area}",
    "plans for {area} lack goals and dates",
    "contractors were paid twice for {area} in {year}",
    "data on {area} from {number} states had errors",
)
ACTIONS = (
    "set goals for {area}",
    "train staff on {area}",
    "keep a complete list of {area}",
    "check the data on {area} each year",
    "recover {amount} million dollars paid for {area}",
)
EFFECTS = (
    "the public cannot be assured that money is used as intended",
    "taxpayers may face higher costs",
    "people who depend on the program may wait longer",
    "leaders may lack what they need to make decisions",
)
HISTORY = (
    "In {year}, GAO found that {finding}.",
    "In {year}, GAO recommended that the agency {action}.",
    "In {year}, Congress asked GAO to review {area}.",
    "The agency agreed with a recommendation to {action}.",
    "Without changes, {effect}.",
)
SUMMARY = (  # one of two wordings for each sentence
    ("Congress asked GAO to review the {program} of the {agency}.", "This report examines the {program} of the {agency}."),
    ("GAO found that {first}, and that {second}.", "Among other weaknesses, {first}; also, {second}."),
    ("Without changes, {effect}.", "Until the agency acts, {effect}."),
    ("GAO recommended that the agency {action}, and {last}.", "The agency agreed with recommendations to {action} and {last}."),
)


def write_document(rng: random.Random) -> Document:
    """One report and the summary that follows from it: agency, two main findings, the actions asked for."""
    agency, program, areas = rng.choice(TOPICS)
    effect = rng.choice(EFFECTS)

    def fill(template: str) -> str:
        """The template with choices of its own; a finding or action inside it is filled the same way."""
        for name, choices in (("finding", FINDINGS), ("action", ACTIONS)):
            template = template.replace(f"{{{name}}}", rng.choice(choices))
        return template.format(
            area=rng.choice(areas),
            year=rng.randint(2010, 2024),
            percent=rng.randint(2, 60),
            number=rng.randint(2, 40),
            amount=rng.randint(10, 99),
            effect=effect,
        )

    findings = [fill(template) for template in rng.sample(FINDINGS, rng.randint(4, 6))]
    actions = [fill(template) for template in rng.sample(ACTIONS, 2)]
    history = " ".join(fill(template) for template in rng.sample(HISTORY, 2))
    lines = ["### Background:", f"The {agency} runs the {program}. {history}"]
    lines += ["### Findings:", *(f"- {finding[0].upper()}{finding[1:]}." for finding in findings)]
    lines += ["### Actions:", *(f"- The agency should {action}." for action in actions)]
    facts = {"agency": agency, "program": program, "first": findings[0], "second": findings[1]}
    facts |= {"action": actions[0], "last": actions[1], "effect": effect}
    return Document("\n".join(lines), " ".join(rng.choice(wordings) for wordings in SUMMARY).format(**facts))


def documents(stream: str, seen: set[str]) -> Iterator[Document]:
    """Endless documents of the random stream of this name, without those whose report is in `seen`, where each is noted."""
    rng = random.Random(stream)
    while True:
        document = write_document(rng)
        if document.report not in seen:
            seen.add(document.report)
            yield document
