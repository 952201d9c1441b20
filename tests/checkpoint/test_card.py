"""The card: lineage that survives, and the licence duties where Llama went in.

Run: python -m pytest tests/checkpoint/test_card.py
"""

import pytest
from huggingface_hub import ModelCard

from herdling.checkpoint import Card, open_model, save_model
from herdling.checkpoint.card import NOTICE
from herdling.errors import CheckpointError
from herdling.model.config import preset

CONFIG = preset("nano", vision=False, vocab_size=320)
BOTH = preset("nano", vocab_size=320)


def test_lineage_survives_load_train_save(tmp_path, random_model):
    first = Card("toy", license="apache-2.0").after("pretrain", data=["stdlib"], note="100 steps")
    save_model(random_model(CONFIG), CONFIG, tmp_path / "a", card=first)
    model, config = open_model(tmp_path / "a")
    second = Card.open(tmp_path / "a", config).after("sft", data=["someone/chats"], source="judge")
    save_model(model, config, tmp_path / "b", card=second)
    again = Card.open(tmp_path / "b", config)
    assert again == second
    assert [step.stage for step in again.steps] == ["pretrain", "sft"]
    assert again.steps[0].note == "100 steps"
    assert not again.llama
    assert again.duties() is None


def test_hub_metadata(tmp_path):
    card = Card("toy", license="mit", results={"arithmetic": 0.75}).after("x")
    assert card.results == {}  # the results of other weights
    card = Card("toy", license="mit", results={"arithmetic": 0.75, "read_number": 0.5})
    card.save(tmp_path, BOTH)
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data.pipeline_tag, data.library_name) == (
        "mit",
        "image-text-to-text",
        "transformers",
    )
    # Results of one dataset type would come back merged, all under the first task's name.
    assert {r.dataset_name: r.metric_value for r in data.eval_results} == card.results
    assert len({r.dataset_type for r in data.eval_results}) == 2
    (index,) = data.to_dict()["model-index"]
    assert [entry["dataset"]["name"] for entry in index["results"]] == list(card.results)
    assert Card.open(tmp_path, BOTH) == card
    assert "| arithmetic | 0.750 |" in (tmp_path / "README.md").read_text()
    assert not (tmp_path / "NOTICE").exists()


def test_datasets_and_bases_that_came_from_the_hub_are_listed(tmp_path):
    card = Card("toy").after(
        "sft",
        source="someone/base",
        data=["someone/chats", "local.jsonl"],
        hub=["someone/base", "someone/chats"],
    )
    card.save(tmp_path, CONFIG)
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.base_model, data.datasets) == (["someone/base"], ["someone/chats"])
    assert Card.open(tmp_path, CONFIG) == card


def test_folders_and_built_in_data_are_not_published_as_hub_names(tmp_path):
    card = Card("toy").after("sft", source="runs/base", data=["picture/scene", "someone/chats"])
    card.save(tmp_path, CONFIG)
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.base_model, data.datasets) == (None, None)
    assert Card.open(tmp_path, CONFIG) == card  # told in the lineage all the same


@pytest.mark.parametrize("touch", ["weights", "outputs"])
def test_licence_duties_where_llama_went_in(tmp_path, touch):
    card = Card("my-toy", license="mit").after(
        "distill", source="meta-llama/X", llama=touch, hub=["meta-llama/X"]
    )
    card = card.after("sft")
    card.save(tmp_path, BOTH)
    text = (tmp_path / "README.md").read_text("utf-8")
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data.license_name) == ("other", "llama4")
    assert card.title == "Llama-my-toy"
    assert "# Llama-my-toy" in text
    assert "**Built with Llama**" in text
    assert f"Llama 4 {touch} went into this model" in text
    assert "European Union" in text
    assert (tmp_path / "NOTICE").read_text("utf-8").strip() == NOTICE
    assert Card.open(tmp_path, BOTH).llama
    assert (data.base_model == ["meta-llama/X"]) == (touch == "weights")


def test_eu_clause_is_about_multimodal_models(tmp_path):
    Card("t").after("x", llama="weights").save(tmp_path, CONFIG)
    assert "European Union" not in (tmp_path / "README.md").read_text("utf-8")


@pytest.mark.parametrize("name", ["Llama-4-mine", "someone/Llama-mine"])
def test_a_name_that_begins_with_llama_stays(name):
    assert Card(name).after("x", llama="outputs").title == name


def foreign(folder, metadata: str) -> Card:
    (folder / "README.md").write_text(f"---\n{metadata}\n---\n# A model\n")
    return Card.open(folder, CONFIG)


@pytest.mark.parametrize(
    "metadata",
    [
        "license: other\nlicense_name: llama4",
        "license: llama4",
        "base_model: meta-llama/Llama-4-Scout-17B-16E",
        "base_model:\n- someone/x\n- unsloth/Llama-4-Maverick-17B-128E",
    ],
)
def test_foreign_cards_that_name_llama(tmp_path, metadata):
    assert foreign(tmp_path, metadata).llama


def test_foreign_cards_of_other_models(tmp_path):
    card = foreign(tmp_path, "license: apache-2.0\nbase_model: someone/x")
    assert not card.llama
    assert card.license == "apache-2.0"
    assert card.steps[0].source == "someone/x"
    card.save(tmp_path, CONFIG)
    assert ModelCard.load(tmp_path / "README.md").data.base_model == ["someone/x"]


def test_a_readme_without_metadata(tmp_path):
    (tmp_path / "README.md").write_text("just words\n")
    assert Card.open(tmp_path, CONFIG).steps[0].stage == "origin"


@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_without_a_card_a_release_is_known_by_its_shape(tmp_path, name):
    card = Card.open(tmp_path, preset(name))
    assert card.llama
    assert "presumed" in card.steps[0].note
    assert not Card.open(tmp_path, CONFIG).llama


@pytest.mark.parametrize("own", ["herdling: {}", "herdling: 3", "herdling: {lineage: [{bad: 1}]}"])
def test_broken_metadata_is_an_error(tmp_path, own):
    with pytest.raises(CheckpointError, match=r"README\.md"):
        foreign(tmp_path, own)


def test_opening_llama_says_the_duties(tmp_path, random_model, caplog):
    card = Card("toy").after("import-meta", llama="weights")
    save_model(random_model(CONFIG), CONFIG, tmp_path / "m", card=card)
    open_model(tmp_path / "m")
    assert "Built with Llama" in caplog.text
    caplog.clear()
    save_model(random_model(CONFIG), CONFIG, tmp_path / "m", card=Card("toy"))
    open_model(tmp_path / "m")
    assert not caplog.records
