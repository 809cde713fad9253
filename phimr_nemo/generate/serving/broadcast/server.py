"""The routes by which a rollout server's workers join a group with the trainer, and take buckets out of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from fastapi import APIRouter, HTTPException, Request

from phimr_nemo.generate.serving.broadcast.group import Described, Membership, Offer
from phimr_nemo.generate.serving.receiving import CONFLICT, Receiver
from phimr_nemo.generate.serving.weights import BROADCAST, GONE, GROUP, NotArrived


class Member(Receiver, Protocol):
    """One whose workers can be in a process group with the trainer's: weights go from GPU to GPU."""

    async def membership(self) -> Membership:
        """The group it is in, and what it can be in."""
        ...

    async def join(self, offer: Offer) -> None:
        """Leave the group it is in and become a member of another; returns when all are.

        Raises:
            NotArrived: it did not form.
        """
        ...

    async def receive(self, group: str, tensors: Sequence[Described]) -> None:
        """Take one bucket out of the group; only when all of it is there it is loaded.

        Raises:
            WrongWeights: it is not a part of this model.
            NotArrived: it did not come.
        """
        ...


def group_routes(member: Member) -> APIRouter:
    """The routes by which weights come from the trainer's GPU."""
    router = APIRouter()

    @router.get(GROUP)
    async def membership() -> dict[str, Any]:
        return vars(await member.membership())

    @router.post(GROUP)
    async def join(offer: Offer) -> dict[str, str]:
        try:
            await member.join(offer)
        except NotArrived as error:
            raise HTTPException(CONFLICT, str(error)) from error
        return {}

    @router.post(BROADCAST)
    async def receive(request: Request) -> dict[str, str]:
        try:
            message = await request.json()
            await member.receive(str(message["group"]), [Described.parse(value) for value in message["tensors"]])
        except NotArrived as error:
            raise HTTPException(GONE, str(error)) from error
        except (ValueError, TypeError, KeyError) as error:
            raise HTTPException(CONFLICT, str(error)) from error
        return {}

    return router
