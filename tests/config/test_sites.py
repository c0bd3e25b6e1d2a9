"""Which site is used, what `extends` gives, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcserve.config import sites
from hpcserve.config.load import load_model
from hpcserve.config.sites import find_site, site_files
from hpcserve.errors import ConfigError

from .files import Files

SHIPPED = ("dgx-b200", "dgx-h100", "gb200-nvl72", "generic-slurm", "local", "test-cluster")
USER = "home/.config/hpcserve/sites"


@pytest.fixture(autouse=True)
def no_system_sites(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites, "SYSTEM_SITES", files.root / "etc")


def test_knows_the_shipped_sites(files: Files) -> None:
    assert tuple(site_files(files.environ())) == SHIPPED


def test_the_flag_wins_over_the_variable_over_the_model_over_the_host_name(files: Files) -> None:
    files.write(f"{USER}/here.yaml", "extends: local\nmatch: {hostnames: [login1]}\n")
    files.write("model.yaml", "model: a\nsite: dgx-h100\n")
    model = load_model("model.yaml")
    variable = files.environ(HPCSERVE_SITE="dgx-b200")
    found = [
        find_site("local", environ=variable, hostname="login1", model=model),
        find_site(None, environ=variable, hostname="login1", model=model),
        find_site(None, environ=files.environ(), hostname="login1", model=model),
        find_site(None, environ=files.environ(), hostname="login1"),
    ]
    assert [(site.value.name, site.where) for site in found] == [
        ("local", "--site"),
        ("dgx-b200", "HPCSERVE_SITE"),
        ("dgx-h100", "model.yaml:2"),
        ("here", "host name login1 matches login1"),
    ]


@pytest.mark.parametrize(
    "hostname", ["login2", "LOGIN2.atlas.example.edu", "login2.other.net", "n7.atlas.example.edu"]
)
def test_host_names_match_whole_or_up_to_the_first_dot(files: Files, hostname: str) -> None:
    patterns = '["login?", "*.atlas.example.edu"]'
    files.write(f"{USER}/atlas.yaml", f"extends: local\nmatch: {{hostnames: {patterns}}}\n")
    assert find_site(None, environ=files.environ(), hostname=hostname).value.name == "atlas"


def test_the_directories_are_searched_in_their_order(files: Files) -> None:
    for directory in (USER, "etc", "group"):
        files.write(f"{directory}/local.yaml", f"extends: local\ndescription: from {directory}\n")
    environ = files.environ(HPCSERVE_SITES="group")
    shown = []
    for directory in ("group", USER, "etc"):
        site = find_site("local", environ=environ, hostname="x")
        shown.append(site.value.description)
        (files.root / directory / "local.yaml").unlink()
    assert shown == ["from group", f"from {USER}", "from etc"]
    assert find_site("local", environ=environ, hostname="x").value.description.startswith("This machine")


def test_the_configuration_home_can_be_elsewhere(files: Files) -> None:
    files.write("xdg/hpcserve/sites/mine.yaml", "extends: local\n")
    environ = files.environ(XDG_CONFIG_HOME=str(files.root / "xdg"))
    assert find_site("mine", environ=environ, hostname="x").value.name == "mine"


def test_a_name_that_ends_in_yaml_is_a_file(files: Files) -> None:
    files.write("dir/trial.yaml", "extends: local\n")
    loaded = find_site("dir/trial.yaml", environ=files.environ(), hostname="x")
    assert (loaded.value.name, loaded.file, loaded.where) == ("trial", "dir/trial.yaml", "--site")


def test_extends_merges_sections_and_keeps_the_lines_of_both_files(files: Files) -> None:
    files.write(
        f"{USER}/mine.yaml",
        "extends: dgx-h100\nslurm:\n  account: abc\n  qos: null\nnode: {gpus: 4}\nnetwork:\n  env: {X: 1}\n",
    )
    loaded = find_site("mine", environ=files.environ(), hostname="x")
    site = loaded.value
    assert (site.name, site.slurm.account, site.node.gpus) == ("mine", "abc", 4)
    assert site.node.gpu == "H100 80GB", "the rest of the section is the other site's"
    assert site.network.env["X"] == "1" and "UCX_TLS" in site.network.env
    path = files.root / USER / "mine.yaml"
    assert loaded.origins["slurm.account"] == f"{path}:3"
    file, _, line = loaded.origins["node.gpu"].rpartition(":")
    assert Path(file).name == "dgx-h100.yaml"
    assert "gpu: H100" in Path(file).read_text().splitlines()[int(line) - 1]


def test_extends_reaches_through_several_files(files: Files) -> None:
    files.write(f"{USER}/a.yaml", "extends: b\ngpu_hour_rate: 2\n")
    files.write(f"{USER}/b.yaml", "extends: dgx-h100\nslurm: {partition: gpu}\n")
    site = find_site("a", environ=files.environ(), hostname="x").value
    assert (site.name, site.gpu_hour_rate, site.slurm.partition, site.node.gpus) == ("a", 2.0, "gpu", 8)


def test_a_site_may_extend_the_one_it_hides(files: Files) -> None:
    files.write(f"{USER}/dgx-h100.yaml", "extends: dgx-h100\nslurm: {partition: gpu}\n")
    site = find_site("dgx-h100", environ=files.environ(), hostname="x").value
    assert (site.slurm.partition, site.node.gpus) == ("gpu", 8)


def test_a_users_site_wins_over_the_groups_whose_host_names_it_inherits(files: Files) -> None:
    files.write("etc/atlas.yaml", "extends: dgx-h100\nmatch: {hostnames: [login1]}\n")
    files.write(f"{USER}/mine.yaml", "extends: atlas\nslurm: {account: abc}\n")
    assert find_site(None, environ=files.environ(), hostname="login1").value.name == "mine"


MINIMAL = "node: {gpus: 4}\n"

BAD = {
    "an unknown key": ("slurm: {partiton: x}\n" + MINIMAL, "SITE:1: key 'slurm.partiton' is unknown"),
    "an unknown section": ("slrm: {}\n" + MINIMAL, "SITE:1: key 'slrm' is unknown; allowed here: name, "),
    "no node": ("scheduler: slurm\n", "SITE:1: key 'node' is missing"),
    "no gpus": ("node: {cpus: 4}\n", "SITE:1: key 'node.gpus' is missing"),
    "too many gpus": ("node: {gpus: 65}\n", "SITE:1: key 'node.gpus' must be from 0 to 64, not 65"),
    "a wrong scheduler": (
        "scheduler: pbs\n" + MINIMAL,
        "SITE:1: key 'scheduler' must be one of slurm, local, not 'pbs'",
    ),
    "a number for --mem": (
        "slurm: {memory: 0}\n" + MINIMAL,
        "SITE:1: key 'slurm.memory' must be text, not '0'",
    ),
    "a wrong unit for --mem": (
        "slurm: {memory: 10GB}\n" + MINIMAL,
        r"SITE:1: key 'slurm.memory' must match \d+[KMGT]?, not '10GB'",
    ),
    "an sbatch option without dashes": (
        "slurm: {extra: [comment=x]}\n" + MINIMAL,
        "SITE:1: key 'slurm.extra[0]' must match --[a-z].*, not 'comment=x'",
    ),
    "an sbatch option that begins a line of the script": (
        'slurm: {partition: "x\\n#SBATCH -A y"}\n' + MINIMAL,
        "SITE:1: key 'slurm.partition' must be one line of printable characters, not 'x\\n#SBATCH -A y'",
    ),
    "one module instead of a list": (
        "setup: {modules: cuda/12}\n" + MINIMAL,
        "SITE:1: key 'setup.modules' must be a list of texts, not 'cuda/12'",
    ),
    "a module that is a number": (
        "setup: {modules: [3.11]}\n" + MINIMAL,
        "SITE:1: key 'setup.modules[0]' must be text, not '3.11'",
    ),
    "a day that is none": (
        "slurm: {checked: yesterday}\n" + MINIMAL,
        r"SITE:1: key 'slurm.checked' must match |\d{4}-\d{2}-\d{2}, not 'yesterday'",
    ),
    "another name than the file's": (
        "name: other\n" + MINIMAL,
        "SITE:1: key 'name' is 'other', but the file is called mine.yaml",
    ),
    "ports the wrong way round": (
        "ports: {low: 3000, high: 2000}\n" + MINIMAL,
        "SITE:1: keys 'ports.low' and 'ports.high' must hold at least 16 ports, not 3000-2000",
    ),
    "a default walltime over the limit": (
        "slurm:\n  max_walltime: 00:30:00\n" + MINIMAL,
        "SITE:2: key 'slurm.default_walltime' (3600 s) must not exceed 'slurm.max_walltime' (1800 s)",
    ),
    "an image without a runtime": (
        "container: {image: x.sqsh}\n" + MINIMAL,
        "SITE:1: key 'container.image' needs 'container.runtime'; allowed: pyxis, apptainer",
    ),
    "a runtime without an image": (
        "container: {runtime: pyxis}\n" + MINIMAL,
        "SITE:1: key 'container.runtime' is pyxis, but 'container.image' is missing",
    ),
    "extends nothing known": (
        "extends: dgx-h10\n",
        "SITE:1: key 'extends' names no site: 'dgx-h10'; known sites: dgx-b200, dgx-h100, ",
    ),
    "extends a list": ("extends: [local]\n", "SITE:1: key 'extends' must be a site's name, not a list"),
    "extends itself": ("extends: mine\n", "SITE:1: key 'extends' leads back to this file: 'mine'"),
    "an empty file": ("", "SITE:1: the file is empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_refuses(files: Files, name: str) -> None:
    text, expected = BAD[name]
    path = files.write(f"{USER}/mine.yaml", text)
    with pytest.raises(ConfigError) as caught:
        find_site("mine", environ=files.environ(), hostname="x")
    message = caught.value.message.replace(str(path), "SITE")
    assert message.startswith(expected)
    assert message == expected or expected.endswith((", ", "unknown"))
    assert caught.value.hint


def test_refuses_sites_that_extend_each_other(files: Files) -> None:
    files.write(f"{USER}/a.yaml", "extends: b\n")
    path = files.write(f"{USER}/b.yaml", "extends: a\n")
    with pytest.raises(ConfigError) as caught:
        find_site("a", environ=files.environ(), hostname="x")
    assert caught.value.message == f"{path}:1: key 'extends' leads back to this file: 'a'"


@pytest.mark.parametrize(
    ("flag", "variable", "message"),
    [
        ("dgx-h10", "", "--site: there is no site 'dgx-h10'; known sites: "),
        (None, "Local", "HPCSERVE_SITE: there is no site 'Local'; known sites: "),
    ],
)
def test_an_unknown_name_lists_the_known_ones(
    files: Files, flag: str | None, variable: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        find_site(flag, environ=files.environ(HPCSERVE_SITE=variable), hostname="x")
    assert caught.value.message == message + ", ".join(SHIPPED)
    assert str(caught.value.hint).startswith("Did you mean '")


def test_an_unknown_name_in_the_model_is_shown_with_its_line(files: Files) -> None:
    files.write("model.yaml", "model: a\nsite: nowhere\n")
    model = load_model("model.yaml")
    with pytest.raises(ConfigError, match=r"^model\.yaml:2: there is no site 'nowhere'; known sites: dgx"):
        find_site(None, environ=files.environ(), hostname="x", model=model)


def test_nothing_that_matches_lists_the_sites_and_takes_none_of_them(files: Files) -> None:
    with pytest.raises(ConfigError) as caught:
        find_site(None, environ=files.environ(), hostname="laptop")
    assert caught.value.message == (
        f"no site config matches the host name laptop; known sites: {', '.join(SHIPPED)}"
    )


def test_two_sites_for_one_host_name_are_not_decided_by_chance(files: Files) -> None:
    one = files.write(f"{USER}/one.yaml", "extends: local\nmatch: {hostnames: [login1]}\n")
    two = files.write(f"{USER}/two.yaml", "extends: local\nmatch: {hostnames: ['login*']}\n")
    with pytest.raises(ConfigError) as caught:
        find_site(None, environ=files.environ(), hostname="login1")
    assert caught.value.message == f"several site configs match the host name login1: {one}, {two}"


def test_a_missing_directory_in_the_variable_is_an_error(files: Files) -> None:
    with pytest.raises(ConfigError, match=r"^HPCSERVE_SITES: /nowhere is not a directory$"):
        find_site("local", environ=files.environ(HPCSERVE_SITES="/nowhere"), hostname="x")


def test_a_missing_site_file_is_an_error(files: Files) -> None:
    with pytest.raises(ConfigError, match=r"^trial\.yaml: there is no such file"):
        find_site("trial.yaml", environ=files.environ(), hostname="x")


def test_a_broken_site_does_not_disturb_one_chosen_by_name(files: Files) -> None:
    files.write(f"{USER}/broken.yaml", "node: {")
    assert find_site("local", environ=files.environ(), hostname="x").value.name == "local"


def test_types_of_nodes_are_read_by_name_and_laid_on_those_of_the_site_below(files: Files) -> None:
    files.write(f"{USER}/base.yaml", "extends: dgx-h100\nnode_types: {l40s: {gpus: 4, partition: small}}\n")
    files.write(f"{USER}/mine.yaml", "extends: base\nnode_types:\n  l40s: {gpu_memory_gib: 48}\n")
    found = find_site("mine", environ=files.environ(), hostname="x")
    l40s = found.value.node_types["l40s"]
    assert (l40s.gpus, l40s.gpu_memory_gib, l40s.partition) == (4, 48, "small")
    assert found.origins["node_types.l40s.gpu_memory_gib"].endswith("mine.yaml:3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node_types: [l40s]", r"site\.yaml:2: key 'node_types' must be a mapping"),
        ("node_types: {l40s: 4}", r"site\.yaml:2: key 'node_types\.l40s' must be a mapping"),
        ("node_types: {'l 4': {gpus: 4}}", r"site\.yaml:2: key 'node_types\.l 4' must be a name"),
        ("node_types: {l40s: {}}", r"site\.yaml:2: key 'node_types\.l40s\.gpus' is missing"),
        ("node_types: {l40s: {gpu: 4}}", r"site\.yaml:2: key 'node_types\.l40s\.gpu' must be text"),
        ("node_types: {l40s: {cpu: 4}}", r"site\.yaml:2: key 'node_types\.l40s\.cpu' is unknown"),
    ],
)
def test_types_of_nodes_are_checked(files: Files, text: str, message: str) -> None:
    files.write("site.yaml", f"extends: dgx-h100\n{text}\n")
    with pytest.raises(ConfigError, match=f"^{message}"):
        find_site("site.yaml", environ=files.environ(), hostname="x")
