"""How a hospital reaches a service: proxies and certificates, as the environment or the system names them."""

from __future__ import annotations

import http.cookiejar
import importlib.util
import ipaddress
import os
import socket
import ssl
import urllib.request
from collections.abc import Callable

import httpx

from primia_lite.config import UserError


def on_this_machine(host: str) -> bool:
    """Loopback names and addresses, in all forms that systems read; and 0.0.0.0 and ::, which lead here, too."""
    name = host.lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name.partition("%")[0] if ":" in name else socket.inet_aton(name))
    except (OSError, ValueError):
        return False
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified


def connector(
    url: str, ca_file: str | None, timeout_s: float, transport: httpx.BaseTransport | None
) -> tuple[Callable[[], httpx.Client], str]:
    """What connects to an address, and the address for messages, without passwords."""
    try:
        address = httpx.URL(url)
        if address.scheme not in ("http", "https") or not address.host:
            raise ValueError("it has no http:// or no host")
    except (httpx.InvalidURL, ValueError) as error:
        raise UserError(f"{url!r} isn't an address ({error}): give one such as http://127.0.0.1:8000") from error
    proxy, variable = proxy_for(address)
    where = f"{address.scheme}://{address.netloc.decode()}{address.path.rstrip('/')}"
    if proxy is not None:
        where += f" (by the proxy {proxy.url.scheme}://{proxy.url.netloc.decode()} of {variable})"
    trusted = trusted_certificates(address.scheme, ca_file)

    def connect() -> httpx.Client:
        return httpx.Client(
            base_url=url, timeout=timeout_s, trust_env=False, headers={"Accept-Encoding": "identity"},
            transport=transport or httpx.HTTPTransport(verify=trusted, proxy=proxy, trust_env=False),
            # A service has nothing to remember at a hospital.
            cookies=http.cookiejar.CookieJar(http.cookiejar.DefaultCookiePolicy(allowed_domains=[])),
        )  # fmt: skip

    return connect, where


def trusted_certificates(scheme: str, ca_file: str | None) -> ssl.SSLContext:
    """Certificates: those of the file, else those that httpx takes, with its variables."""
    try:
        if ca_file:
            return ssl.create_default_context(cafile=ca_file)
        # Without TLS nobody is to be trusted, and no variable to be read.
        return httpx.create_ssl_context() if scheme == "https" else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    except (OSError, ValueError) as error:  # SSLError is an OSError
        named = [name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE") if os.environ.get(name)]
        raise UserError(
            f"the certificates of {ca_file or ' or '.join(named)} can't be read ({error}): give a PEM file with the "
            "one to trust"
        ) from error


def proxy_for(address: httpx.URL) -> tuple[httpx.Proxy | None, str]:
    """The proxy for an address, as the environment or the system says, and the variable that names it."""
    found = urllib.request.getproxies()
    kind = address.scheme if found.get(address.scheme) else "all"
    places = (address.host, address.netloc.decode())
    if not found.get(kind) or on_this_machine(address.host) or any(map(urllib.request.proxy_bypass, places)):
        return None, ""
    # Lower case comes first, as for urllib.
    variables = [name for name in sorted(os.environ, reverse=True) if name.lower() == f"{kind}_proxy"]
    variable = variables[0] if variables else "this system's settings"
    try:
        proxy = httpx.Proxy(found[kind] if "://" in found[kind] else f"http://{found[kind]}")
        if not proxy.url.host or proxy.url.raw_path != b"/" or proxy.url.fragment:
            raise ValueError
    except (httpx.InvalidURL, ValueError):
        # Not what it is: there may be a password in it.
        raise UserError(
            f"the proxy of {variable} has an address that is none: give one such as http://proxy.example:3128, "
            f"or name {address.host} in NO_PROXY"
        ) from None
    if proxy.url.scheme.startswith("socks") and not importlib.util.find_spec("socksio"):
        raise UserError(f"the proxy of {variable} is a SOCKS proxy: give one for HTTP, or install socksio")
    return proxy, variable
