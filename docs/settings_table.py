"""The table in docs/settings.md: `python docs/settings_table.py > docs/settings.md`."""

from vitgal.settings.section import Section, fact
from vitgal.settings.sections import NOTEBOOKS, SECTIONS

HEAD = """# Settings

Every setting with its default. A notebook's first cell shows those that are changed most often. Any
other can be added there, given in a YAML file (`params/`), or typed as `-p NAME VALUE`. The last
column says whether a setting changes results; the others change speed, paths or pictures. The
defaults themselves are declared in `vitgal/settings/`: [how to change one](../CONTRIBUTING.md).
"""


def settings_table() -> str:
    """Returns all sections in Markdown, one table each."""
    return "\n".join([HEAD, *(_section_table(section) for section in SECTIONS)])


def _section_table(section: type[Section]) -> str:
    notebooks = ", ".join(name[:2] for name, used in NOTEBOOKS.items() if section in used)
    title = (section.__doc__ or "").partition("\n")[0]
    lines = [f"## {section.__name__}", "", f"{title} In notebooks {notebooks}.", ""]
    lines += ["| setting | default | meaning | changes |", "|---|---|---|---|"]
    for name, entry in section.flat().items():
        facts = fact(entry)
        meaning = facts.meaning + (f" ({facts.unit})" if facts.unit else "")
        if facts.published is not None:
            meaning += f"; published: {facts.published}"
        if facts.choices:
            meaning += f"; one of {', '.join(facts.choices)}"
        meaning = meaning.replace("<", "\\<")  # no tag of HTML
        default = "" if entry.default == "" else f"`{entry.default}`"
        lines.append(f"| `{name}` | {default} | {meaning} | {'results' if facts.result else '-'} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    print(settings_table(), end="")
