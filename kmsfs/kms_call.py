"""What an administrator may know of one request to KMS: identifiers, nothing secret."""

import msgspec


class KmsCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One request, with what is known of it.

    Attributes:
        key_id: the key as it was named to KMS, or the ARN that KMS answered with.
        request_id: as CloudTrail has it; None if there was no answer.
        access_key_id: of the credentials that signed it; it is public, its secret half is not
            here.
        principal: ARN of who asked, if KMS or the configuration names it.
    """

    key_id: str | None = None
    request_id: str | None = None
    access_key_id: str | None = None
    principal: str | None = None
