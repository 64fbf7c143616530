"""Sessions, credentials and clients of botocore, and what a zygote prepares of them.

Nothing here asks KMS for anything; getting credentials may ask STS, SSO, a metadata service or a
program that the profile names.
"""

import codecs
import contextlib
import os
import re
import threading
import time
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit
from urllib.request import getproxies

import botocore.exceptions
from botocore.awsrequest import AWSPreparedRequest
from botocore.client import BaseClient
from botocore.config import Config
from botocore.credentials import (
    AssumeRoleCredentialFetcher,
    CredentialProvider,
    CredentialResolver,
    Credentials,
    DeferredRefreshableCredentials,
    create_credential_resolver,
)
from botocore.httpsession import ProxyConfiguration
from botocore.loaders import Loader
from botocore.session import Session

from kmsfs.error_codes import from_code
from kmsfs.errors import ConfigInvalid, CredentialsUnavailable, KmsfsError
from kmsfs.keys import aws_errors, deadline
from kmsfs.keys.credentials import (
    STATIC_SOURCES,
    UNDATED_S,
    CredentialStore,
    FailedSearch,
    SessionCredentials,
)
from kmsfs.settings import KmsSettings

# Botocore's defaults wait 60 s for each connection and each read, five times over.
CONNECT_TIMEOUT_S: Final = 1.0
READ_TIMEOUT_S: Final = 2.0
ATTEMPTS: Final = 3

_ROLE_SESSION_NAME: Final = "kmsfs"

_ARN: Final = re.compile(r"arn:[^:]+:kms:([^:]+):[^:]*:(?:key|alias)/.+")

# What botocore calls the environment; its other names are words of the AWS documentation.
_SOURCE_NAMES: Final = {"env": "environment"}

# AWS Signature Version 4: the access key id stands before the first slash.
_SIGNED_BY: Final = re.compile(r"Credential=([A-Z0-9]{1,128})/")

_UNSET: Final = (None, None, None, None)
_NO_FILE: Final = (None, None, os.devnull, None)
_PLACEHOLDER: Final = "placeholder"

_DEFAULT_PORTS: Final = {"http": 80, "https": 443}


class AwsSession:
    """Credentials from one moment on, and the clients that use them, by region.

    Files and environment are read when first needed, and not again; botocore refreshes what its
    source can refresh, unless they were frozen. Make a new one where credentials were not there
    or are refused.

    Attributes:
        frozen: the credentials that `freeze` found; None before.
        found_here: whether it asked their source for them, and not the store.
        signed_by: the access key id that the last request to KMS was signed with; None before.
    """

    def __init__(self, settings: KmsSettings) -> None:
        self._endpoint_url = settings.endpoint_url
        self._session = _take_session(settings)
        self._region = settings.region
        self._region_known = settings.region is not None
        self._clients: dict[str, BaseClient] = {}
        self._credentials: Credentials | None = None
        self._lock = threading.Lock()
        self.frozen: SessionCredentials | None = None
        self.found_here = False
        self.signed_by: str | None = None

    @property
    def region(self) -> str | None:
        """The region for keys whose name has none.

        Raises: botocore's errors of configuration, such as ProfileNotFound.
        """
        if not self._region_known:
            self._region = self._session.get_config_variable("region")
            self._region_known = True
        return self._region

    @property
    def credential_source(self) -> str | None:
        """Where the credentials came from; None before there are any."""
        if self._credentials is None:
            return None
        return _SOURCE_NAMES.get(self._credentials.method, self._credentials.method)

    def client(self, region: str) -> BaseClient:
        """The KMS client for a region; it signs with credentials that were found.

        Raises:
            CredentialsUnavailable: none were found.
            ConfigInvalid: endpoint_url is no URL.
            botocore's own errors, and `aws_errors.STRAY` from sources of credentials.
        """
        with self._lock:
            self._find_credentials(region)
            if region not in self._clients:
                self._clients[region] = self.new_client("kms", region)
            return self._clients[region]

    def new_client(self, service: str, region: str, config: Config | None = None) -> BaseClient:
        """Another client with the same credentials.

        Args:
            service: `kms` or `sts`.
            config: over this module's own timeouts and retries.

        Raises: as `client`.
        """
        self._find_credentials(region)
        try:
            client = self._session.create_client(
                service,
                region_name=region,
                endpoint_url=self._endpoint_url if service == "kms" else None,
                config=config,
            )
        except botocore.exceptions.BotoCoreError:
            raise
        except ValueError:
            raise ConfigInvalid("the endpoint URL of KMS is not a URL") from None
        client.meta.events.register(f"before-send.{service}", _check_deadline)
        client.meta.events.register(f"before-send.{service}", self._note_signer)
        return client

    def freeze(
        self, region: str, store: CredentialStore | None, *, about: tuple[str, str | None]
    ) -> None:
        """Find credentials that no client of this session will refresh; before the first one.

        Args:
            region: where KMS will be asked.
            store: looked into first; takes what had to be found, for other processes.
            about: operation and key that they are for, for an error's detail.

        Raises:
            KmsfsError: there are none.
        """
        began_at = time.monotonic()
        with self._lock, contextlib.nullcontext() if store is None else store.exclusive():
            kept = None if store is None else store.read()
            if isinstance(kept, FailedSearch) and kept.at >= began_at:
                raise from_code(kept.code, kept.detail)
            if not isinstance(kept, SessionCredentials) or kept.near_expiry:
                kept = self._search(region, store, about)
            keys = (kept.access_key, kept.secret_key, kept.token)
            self._session.set_credentials(*keys, account_id=kept.account_id)
            self._credentials = Credentials(*keys, method=kept.source)
            self.frozen = kept

    def _search(
        self, region: str, store: CredentialStore | None, about: tuple[str, str | None]
    ) -> SessionCredentials:
        self.found_here = True
        try:
            with aws_errors.translating(*about):
                found = _as_they_are(self._find_credentials(region))
        except KmsfsError as error:
            if store is not None:
                failed = FailedSearch(at=time.monotonic(), code=error.code, detail=error.detail)
                store.write(failed)
            raise
        if store is not None and found.shareable:
            store.write(found)
        return found

    def ports(self, region: str) -> frozenset[int]:
        """The TCP ports that calls to KMS go to: its endpoint's, and that of a proxy.

        The same in every region.

        Raises: as `client`.
        """
        url = self.client(region).meta.endpoint_url
        proxy = ProxyConfiguration(getproxies()).proxy_url_for(url)
        return frozenset(_port_of(where) for where in (url, proxy) if where)

    def drop_clients(self) -> None:
        """Have new connections made; credentials stay."""
        self._clients = {}

    def _find_credentials(self, region: str) -> Credentials:
        if self.region is None:
            # Sources that ask STS do it where KMS is, as for botocore's own clients.
            self._session.set_config_variable("region", region)
        if self._credentials is None:
            self._credentials = self._session.get_credentials()
        if self._credentials is None:
            raise CredentialsUnavailable("no AWS credentials found")
        return self._credentials

    def _note_signer(self, request: AWSPreparedRequest, **_: object) -> None:
        # Some versions of botocore have bytes there.
        found = _SIGNED_BY.search(str(request.headers.get("Authorization")))
        self.signed_by = found[1] if found is not None else None


def region_of(key_id: str | None) -> str | None:
    """The region in the ARN of a key or alias; None for anything else."""
    found = _ARN.fullmatch(key_id) if key_id is not None else None
    return found[1] if found is not None else None


def credential_source(settings: KmsSettings) -> str | None:
    """Where credentials will come from, as far as that shows without reading any.

    Returns: `assume-role`, `environment`, or None where files and metadata services decide.
        `AwsKeyService.credential_source` knows after the first call.
    """
    if settings.role_arn is not None:
        return _RoleProvider.METHOD
    if settings.profile is None and os.environ.get("AWS_ACCESS_KEY_ID"):
        return _SOURCE_NAMES["env"]
    return None


# --- before fork -------------------------------------------------------------------------------


@dataclass
class _Warm:
    """What a zygote prepared for its children; each has a copy of its own.

    Attributes:
        loader: botocore's data files, parsed.
        session: a session for `settings` that has read no file yet; taken once.
    """

    settings: KmsSettings
    loader: Loader
    session: Session | None


_warm: list[_Warm] = []


def warm_up(settings: KmsSettings) -> None:
    """Do ahead of fork what is slow and the same for every child.

    Reads botocore's own data files only: neither configuration nor credential files. Opens no
    socket, starts no thread. Settings that botocore refuses are reported at the first call.
    """
    throwaway = Session(
        session_vars={"profile": _UNSET, "config_file": _NO_FILE, "credentials_file": _NO_FILE}
    )
    regions = [region for key_id in settings.key_ids if (region := region_of(key_id))]
    regions += [settings.region or "us-east-1"]
    for service in ("kms", "sts") if settings.role_arn is not None else ("kms",):
        with contextlib.suppress(botocore.exceptions.BotoCoreError, ValueError):
            throwaway.create_client(
                service,
                region_name=regions[0],
                aws_access_key_id=_PLACEHOLDER,
                aws_secret_access_key=_PLACEHOLDER,
                config=_client_config(),
            )
    # Python imports this codec when a host name is first looked up.
    codecs.lookup("idna")
    loader = throwaway.get_component("data_loader")
    _warm[:] = [_Warm(settings, loader, _new_session(settings, loader))]


def _take_session(settings: KmsSettings) -> Session:
    if not _warm:
        return _new_session(settings, None)
    warm = _warm[0]
    session = warm.session
    if session is None or warm.settings != settings:
        return _new_session(settings, warm.loader)
    warm.session = None
    return session


def _new_session(settings: KmsSettings, loader: Loader | None) -> Session:
    """A session that has read nothing yet."""
    session = Session(profile=settings.profile)
    if loader is not None:
        session.register_component("data_loader", loader)
    # Also for the clients that botocore makes to get credentials (STS, SSO).
    session.set_default_client_config(_client_config())
    if settings.role_arn is not None:
        provider = _RoleProvider(session, settings.role_arn)
        session.register_component("credential_provider", CredentialResolver([provider]))
    return session


def _client_config() -> Config:
    return Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        max_pool_connections=16,
        tcp_keepalive=True,
        user_agent_extra="kmsfs",
    )


def _port_of(url: str) -> int:
    parts = urlsplit(url)
    return parts.port or _DEFAULT_PORTS.get(parts.scheme, _DEFAULT_PORTS["https"])


# --- credentials -------------------------------------------------------------------------------


def _as_they_are(found: Credentials) -> SessionCredentials:
    """What botocore found; where it only now asks their source, its errors come from here."""
    # Not get_frozen_credentials where there are any: within 15 minutes of their end it would ask
    # the source once more at once.
    now: Any = getattr(found, "_frozen_credentials", None) or found.get_frozen_credentials()
    expires = getattr(found, "_expiry_time", None)
    ends_at = None if expires is None else expires.timestamp()
    if ends_at is None and found.method not in STATIC_SOURCES:
        ends_at = time.time() + UNDATED_S
    return SessionCredentials(
        access_key=now.access_key,
        secret_key=now.secret_key,
        token=now.token,
        account_id=getattr(now, "account_id", None),
        source=found.method,
        ends_at=ends_at,
    )


class _RoleProvider(CredentialProvider):
    """Credentials of a role, taken on with those that botocore finds by itself."""

    METHOD = "assume-role"

    def __init__(self, session: Session, role_arn: str) -> None:
        super().__init__(session)
        self._role_arn = role_arn

    def load(self) -> DeferredRefreshableCredentials:
        """Credentials that ask STS when they are first looked at, and before they expire."""
        region = self.session.get_config_variable("region")

        def create_client(service: str, **parameters: Any) -> BaseClient:
            return self.session.create_client(service, **{"region_name": region, **parameters})

        own = create_credential_resolver(self.session, region_name=region).load_credentials()
        if own is None:
            raise botocore.exceptions.NoCredentialsError
        fetcher = AssumeRoleCredentialFetcher(
            create_client,
            own,
            self._role_arn,
            extra_args={"RoleSessionName": _ROLE_SESSION_NAME},
        )
        return DeferredRefreshableCredentials(fetcher.fetch_credentials, self.METHOD)


def _check_deadline(**_: object) -> None:
    deadline.check()
