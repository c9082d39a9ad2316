"""For mkdocs: pictures of the experiments join the site, pages that come later the navigation."""

from pathlib import Path

from mkdocs.structure.files import File

HERE = Path(__file__).parent
PICTURES = sorted((HERE.parent / "experiments" / "fidelity").glob("*.png"))
LATER = {"trainers.md": "Trainers"}  # behind Compare, where they are there


def on_config(config):
    place = next(i for i, entry in enumerate(config.nav) if "Compare" in entry) + 1
    config.nav[place:place] = [{title: name} for name, title in LATER.items() if (HERE / name).exists()]
    return config


def on_page_markdown(markdown, page, config, files):
    for path in PICTURES:
        markdown = markdown.replace(f"](../{path.relative_to(HERE.parent).as_posix()})", f"]({path.name})")
    return markdown


def on_files(files, config):
    for path in PICTURES:
        files.append(File.generated(config, path.name, abs_src_path=str(path)))
    return files
