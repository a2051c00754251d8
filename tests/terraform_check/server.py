"""A Terraform provider with the schema of a real one that creates nothing.

Terraform starts it as `python -m terraform_check.server SCHEMA` and speaks protocol 6 with it: gRPC on a Unix
socket, by TLS with a certificate that the first line on stdout contains. Terraform itself checks a module
against the schema. The server adds the refusals of `limits`. Attributes that a provider computes are unknown
in a plan and come from `computed` in an apply.

The protocol's messages are those of `tf`. Its runner serves providers whose resources are Python classes, and
none whose schema is data.
"""

# tf, grpcio and msgpack are in .venv-providers, where this module runs, and are not typed.
# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from __future__ import annotations

import base64
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import grpc
import msgpack
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from tf.gen import grpc_controller_pb2 as controller
from tf.gen import grpc_controller_pb2_grpc as controller_rpc
from tf.gen import grpc_stdio_pb2_grpc as stdio_rpc
from tf.gen import tfplugin_pb2 as plugin
from tf.gen import tfplugin_pb2_grpc as plugin_rpc

from terraform_check import computed, limits, schema
from terraform_check.schema import Block, Nested, Schema

_UNKNOWN: Final = msgpack.ExtType(0, b"\0")


class Provider(plugin_rpc.ProviderServicer):  # type: ignore[misc]
    """Answers Terraform with a schema, with plans, and with states of resources that do not exist."""

    def __init__(self, served: Schema) -> None:
        self._schema = served

    def GetMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        return plugin.GetMetadata.Response(server_capabilities=plugin.ServerCapabilities())

    def GetProviderSchema(self, request: Any, context: Any) -> Any:  # noqa: N802
        return plugin.GetProviderSchema.Response(
            provider=_message(self._schema["provider"]),
            resource_schemas={name: _message(block) for name, block in self._schema["resource"].items()},
            data_source_schemas={name: _message(block) for name, block in self._schema["data"].items()},
            server_capabilities=plugin.ServerCapabilities(),
        )

    def ValidateProviderConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        return plugin.ValidateProviderConfig.Response()

    def ConfigureProvider(self, request: Any, context: Any) -> Any:  # noqa: N802
        return plugin.ConfigureProvider.Response()

    def ValidateResourceConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        found = _diagnostics(request.type_name, _unpacked(request.config))
        return plugin.ValidateResourceConfig.Response(diagnostics=found)

    def ValidateDataResourceConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        return plugin.ValidateDataResourceConfig.Response()

    def UpgradeResourceState(self, request: Any, context: Any) -> Any:  # noqa: N802
        state = _packed(json.loads(request.raw_state.json))
        return plugin.UpgradeResourceState.Response(upgraded_state=state)

    def ReadResource(self, request: Any, context: Any) -> Any:  # noqa: N802
        return plugin.ReadResource.Response(new_state=request.current_state)

    def PlanResourceChange(self, request: Any, context: Any) -> Any:  # noqa: N802
        planned, prior = _unpacked(request.proposed_new_state), _unpacked(request.prior_state)
        if planned is None:  # a destroy
            return plugin.PlanResourceChange.Response(planned_state=request.proposed_new_state)
        for name, attribute in self._schema["resource"][request.type_name]["attributes"].items():
            if planned.get(name) is None and attribute["computed"]:
                planned[name] = _UNKNOWN if prior is None else prior.get(name)
        return plugin.PlanResourceChange.Response(
            planned_state=_packed(planned), diagnostics=_diagnostics(request.type_name, planned)
        )

    def ApplyResourceChange(self, request: Any, context: Any) -> Any:  # noqa: N802
        kind, state = request.type_name, _unpacked(request.planned_state)
        if state is not None:
            attributes = self._schema["resource"][kind]["attributes"]
            for name, value in state.items():
                if value == _UNKNOWN:
                    state[name] = computed.of_resource(kind, name, attributes[name]["type"], state)
        return plugin.ApplyResourceChange.Response(new_state=_packed(state))

    def ReadDataSource(self, request: Any, context: Any) -> Any:  # noqa: N802
        kind, state = request.type_name, _unpacked(request.config)
        for name, attribute in self._schema["data"][kind]["attributes"].items():
            if state.get(name) is None and attribute["computed"]:
                state[name] = computed.of_data(kind, name, attribute["type"], state)
        return plugin.ReadDataSource.Response(state=_packed(state))

    def GetFunctions(self, request: Any, context: Any) -> Any:  # noqa: N802
        return plugin.GetFunctions.Response()

    def StopProvider(self, request: Any, context: Any) -> Any:  # noqa: N802
        return plugin.StopProvider.Response()


class _Controller(controller_rpc.GRPCControllerServicer):  # type: ignore[misc]
    """Ends the server when Terraform is done with it."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def Shutdown(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._server.stop(grace=0.2)
        return controller.Empty()


class _Stdio(stdio_rpc.GRPCStdioServicer):  # type: ignore[misc]
    """Terraform asks for the output of a provider. This one has none."""

    def StreamStdio(self, request: Any, context: Any) -> Any:  # noqa: N802
        return iter(())


def serve(served: Schema) -> None:
    """Serve until Terraform ends the server."""
    server = grpc.server(
        ThreadPoolExecutor(8, thread_name_prefix="provider"),
        options=[("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)],
    )
    plugin_rpc.add_ProviderServicer_to_server(Provider(served), server)
    controller_rpc.add_GRPCControllerServicer_to_server(_Controller(server), server)
    stdio_rpc.add_GRPCStdioServicer_to_server(_Stdio(), server)
    with tempfile.TemporaryDirectory() as folder:
        certificate, credentials = _certificate()
        server.add_secure_port(f"unix://{folder}/socket", credentials)
        server.start()
        encoded = base64.b64encode(certificate).decode().rstrip("=")
        # Versions of the plugin protocol and of Terraform's own, then where and how to connect.
        print("1", "6", "unix", f"{folder}/socket", "grpc", encoded, sep="|", flush=True)
        server.wait_for_termination()


def _certificate() -> tuple[bytes, Any]:
    """Return a self-signed certificate for localhost, and credentials of a server that presents it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    credentials = grpc.ssl_server_credentials([(private, certificate.public_bytes(pem))])
    return certificate.public_bytes(serialization.Encoding.DER), credentials


def _diagnostics(kind: str, configuration: Any) -> list[Any]:
    return [
        plugin.Diagnostic(severity=plugin.Diagnostic.ERROR, summary=reason)
        for reason in limits.refusals(kind, configuration)
    ]


def _message(block: Block) -> Any:
    return plugin.Schema(version=0, block=_block(block))


def _block(block: Block) -> Any:
    return plugin.Schema.Block(
        attributes=[
            plugin.Schema.Attribute(
                name=name,
                type=json.dumps(attribute["type"]).encode(),
                required=attribute["required"],
                optional=attribute["optional"],
                computed=attribute["computed"],
            )
            for name, attribute in block["attributes"].items()
        ],
        block_types=[_nested(name, nested) for name, nested in block["blocks"].items()],
    )


def _nested(name: str, nested: Nested) -> Any:
    modes, least = plugin.Schema.NestedBlock, int(nested["required"])
    if name == "timeouts":
        nesting, least, most = modes.SINGLE, 0, 0
    elif nested["mode"] == "single":
        nesting, most = modes.LIST, 1
    else:
        nesting, most = (modes.SET if nested["mode"] == "set" else modes.LIST), 0
    return plugin.Schema.NestedBlock(
        type_name=name, block=_block(nested["block"]), nesting=nesting, min_items=least, max_items=most
    )


def _unpacked(value: Any) -> Any:
    if value.msgpack:
        return msgpack.unpackb(value.msgpack, raw=False, strict_map_key=False)
    return json.loads(value.json) if value.json else None


def _packed(value: Any) -> Any:
    return plugin.DynamicValue(msgpack=msgpack.packb(value))


if __name__ == "__main__":
    serve(schema.read(Path(sys.argv[1])))
