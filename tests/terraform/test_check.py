"""The check of the modules by the schemas of their providers: its parts that need no Terraform."""

from __future__ import annotations

import json
from typing import Any

import pytest

from terraform_check import computed, jsii, limits

SCRIPT = """
function exampleRuleToHclTerraform(struct) {
    const attrs = {
        days: {
            value: cdktn.numberToHclTerraform(struct.days),
            isBlock: false,
            type: "simple",
            storageClassType: "number",
        },
    };
}
class Example extends cdktn.TerraformResource {
            terraformResourceType: 'aws_example',
    get arn() {
        return this.getStringAttribute('arn');
    }
    // name - computed: false, optional: true, required: false
    synthesizeHclAttributes() {
        const attrs = {
            bucket: {
                value: cdktn.stringToHclTerraform(this._bucket),
                isBlock: false,
                type: "simple",
                storageClassType: "string",
            },
            name: {
                value: cdktn.listMapper(cdktn.stringToHclTerraform, false)(this._name),
                isBlock: false,
                type: "set",
                storageClassType: "stringList",
            },
            rule: {
                value: cdktn.listMapperHcl(exampleRuleToHclTerraform, true)(this._rule.internalValue),
                isBlock: true,
                type: "list",
                storageClassType: "ExampleRuleList",
            },
        };
    }
}
"""
DECLARATIONS = """
export interface ExampleConfig extends cdktn.TerraformMetaArguments {
    /** Docs: {@link docs/resources/example#bucket Example#bucket} */
    readonly bucket: string;
    /** Docs: {@link docs/resources/example#name Example#name} */
    readonly name?: string[];
}
export interface ExampleRule {
    /** Docs: {@link docs/resources/example#days Example#days} */
    readonly days: number;
}
"""


def test_the_schema_of_a_resource_is_read_from_its_bindings() -> None:
    block = jsii.resource(jsii.Source(SCRIPT, DECLARATIONS))
    flags = {
        name: (one["type"], one["required"], one["optional"], one["computed"])
        for name, one in block["attributes"].items()
    }
    assert flags == {
        "bucket": ("string", True, False, False),
        "name": (["set", "string"], False, True, False),
        "arn": ("string", False, False, True),
        "id": ("string", False, False, True),
    }
    (rule,) = block["blocks"].values()
    assert rule["mode"] == "list"
    assert rule["block"]["attributes"]["days"]["required"]


def test_bindings_of_another_form_are_an_error() -> None:
    with pytest.raises(jsii.UnreadableBindingsError, match="no class"):
        jsii.resource(jsii.Source("", ""))


MOVES = {"transition": [{"days": 90, "storage_class": "STANDARD_IA"}]}


@pytest.mark.parametrize(
    ("kind", "configuration"),
    [
        ("aws_s3_bucket", {"bucket": "abc-s3alias"}),
        ("aws_s3_bucket_lifecycle_configuration", {"rule": [{"transition": [{"days": 30.5}]}]}),
        ("aws_s3_bucket_lifecycle_configuration", {"rule": [MOVES, {"expiration": [{"days": 30}]}]}),
        ("aws_iam_role", {"name": "a" * 65}),
        ("aws_iam_policy", {"policy": "a" * 6145}),
        ("google_service_account", {"display_name": "a" * 101}),
        ("google_storage_bucket", {"lifecycle_rule": [{"condition": [{"age": -1}]}]}),
        ("google_storage_bucket", {"soft_delete_policy": [{"retention_duration_seconds": 86400}]}),
        ("google_storage_bucket_iam_member", {"condition": [{"description": "a" * 257}]}),
    ],
)
def test_what_a_provider_refuses_beyond_its_schema_is_refused(
    kind: str, configuration: dict[str, Any]
) -> None:
    assert len(limits.refusals(kind, configuration)) == 1


def test_values_that_are_not_known_yet_pass() -> None:
    assert limits.refusals("aws_s3_bucket", {"bucket": object(), "tags": None}) == []


def test_a_policy_document_has_the_form_of_aws() -> None:
    condition = {"test": "StringLike", "variable": "s3:prefix", "values": ["runs/*"]}
    statement = {"sid": "List", "effect": None, "actions": ["s3:ListBucket"], "resources": ["a", "b"]}
    document = json.loads(computed.policy_document({"statement": [{**statement, "condition": [condition]}]}))
    assert document["Statement"] == [
        {
            "Sid": "List",
            "Effect": "Allow",
            "Action": "s3:ListBucket",
            "Resource": ["b", "a"],
            "Condition": {"StringLike": {"s3:prefix": "runs/*"}},
        }
    ]
