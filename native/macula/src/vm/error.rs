//! How errors look in Erlang: small terms, one encoder for each kind.

use std::io;

use quinn_proto::{ConnectError, ConnectionError, TransportErrorCode};
use rustler::{Atom, Encoder, Env, Term};

use crate::vm::messages::atoms;

/// The reason a connection ended, as it stands in messages and errors.
pub(crate) struct Ended<'e>(pub(crate) &'e ConnectionError);

impl Encoder for Ended<'_> {
    fn encode<'a>(&self, env: Env<'a>) -> Term<'a> {
        match self.0 {
            ConnectionError::TimedOut => atoms::timeout().encode(env),
            ConnectionError::Reset => atoms::reset().encode(env),
            ConnectionError::LocallyClosed => atoms::closed().encode(env),
            ConnectionError::VersionMismatch => atoms::version_mismatch().encode(env),
            ConnectionError::CidsExhausted => atoms::cids_exhausted().encode(env),
            ConnectionError::ApplicationClosed(close) => (
                atoms::application_close(),
                close.error_code.into_inner(),
                binary(env, &close.reason),
            )
                .encode(env),
            ConnectionError::ConnectionClosed(close) => match alert(close.error_code) {
                Some(name) => (atoms::tls_alert(), name).encode(env),
                None => (
                    atoms::transport_close(),
                    transport_code(close.error_code),
                    binary(env, &close.reason),
                )
                    .encode(env),
            },
            ConnectionError::TransportError(error) => match alert(error.code) {
                Some(name) => (atoms::tls_alert(), name).encode(env),
                None => (
                    atoms::transport_error(),
                    transport_code(error.code),
                    binary(env, error.reason.as_bytes()),
                )
                    .encode(env),
            },
        }
    }
}

/// Did the peer's application end the connection, as opposed to the transport?
pub(crate) fn closed_by_peer(error: &ConnectionError) -> bool {
    matches!(error, ConnectionError::ApplicationClosed(_))
}

/// Whether an application ended the connection, on whichever side.
pub(crate) fn closed_by_application(error: &ConnectionError) -> bool {
    closed_by_peer(error) || matches!(error, ConnectionError::LocallyClosed)
}

/// Did the peer, its application or its transport, end the connection?
pub(crate) fn closed_remotely(error: &ConnectionError) -> bool {
    matches!(
        error,
        ConnectionError::ApplicationClosed(_)
            | ConnectionError::ConnectionClosed(_)
            | ConnectionError::Reset
    )
}

/// The code a connection ended with: the application's, or the transport's.
pub(crate) fn code(error: &ConnectionError) -> u64 {
    match error {
        ConnectionError::ApplicationClosed(close) => close.error_code.into_inner(),
        ConnectionError::ConnectionClosed(close) => close.error_code.into(),
        ConnectionError::TransportError(error) => error.code.into(),
        _ => 0,
    }
}

/// How quicer calls the end of a connection.
pub(crate) fn status(error: &ConnectionError) -> Atom {
    let of_transport = |code: TransportErrorCode| match (u64::from(code), alert(code)) {
        (0, _) => atoms::success(),
        (1, _) => atoms::internal_error(),
        (2, _) => atoms::connection_refused(),
        (_, Some(alert)) if alert == atoms::user_canceled() => alert,
        (_, Some(alert)) if alert == atoms::handshake_failure() => alert,
        (_, Some(_)) => atoms::tls_error(),
        _ => atoms::protocol_error(),
    };
    match error {
        ConnectionError::TimedOut => atoms::connection_idle(),
        ConnectionError::LocallyClosed => atoms::success(),
        ConnectionError::ApplicationClosed(close) if close.error_code.into_inner() == 0 => {
            atoms::success()
        }
        ConnectionError::ApplicationClosed(_) => atoms::user_canceled(),
        ConnectionError::ConnectionClosed(close) => of_transport(close.error_code),
        ConnectionError::TransportError(error) => of_transport(error.code),
        ConnectionError::Reset => atoms::aborted(),
        ConnectionError::VersionMismatch => atoms::ver_neg_error(),
        ConnectionError::CidsExhausted => atoms::internal_error(),
    }
}

/// Why a dial could not even begin.
pub(crate) fn connect_error(error: &ConnectError) -> Atom {
    match error {
        ConnectError::InvalidServerName(_) => atoms::bad_server_name(),
        ConnectError::InvalidRemoteAddress(_) => atoms::einval(),
        ConnectError::CidsExhausted => atoms::cids_exhausted(),
        ConnectError::EndpointStopping => atoms::closed(),
        ConnectError::NoDefaultClientConfig | ConnectError::UnsupportedVersion => {
            atoms::internal_error()
        }
    }
}

/// The POSIX name of a system error, as `inet:posix/0`.
pub(crate) fn posix(error: &io::Error) -> Atom {
    use io::ErrorKind::*;
    match error.kind() {
        AddrInUse => atoms::eaddrinuse(),
        AddrNotAvailable => atoms::eaddrnotavail(),
        PermissionDenied => atoms::eacces(),
        ConnectionRefused => atoms::econnrefused(),
        InvalidInput => atoms::einval(),
        NetworkUnreachable => atoms::enetunreach(),
        HostUnreachable => atoms::ehostunreach(),
        TimedOut => atoms::timeout(),
        NotFound => atoms::enoent(),
        IsADirectory => atoms::eisdir(),
        NotADirectory => atoms::enotdir(),
        _ => other_posix(error),
    }
}

#[cfg(unix)]
fn other_posix(error: &io::Error) -> Atom {
    match error.raw_os_error() {
        Some(libc::EMFILE | libc::ENFILE) => atoms::emfile(),
        Some(libc::EAFNOSUPPORT) => atoms::eafnosupport(),
        Some(libc::EMSGSIZE) => atoms::emsgsize(),
        _ => atoms::einval(),
    }
}

#[cfg(not(unix))]
fn other_posix(_error: &io::Error) -> Atom {
    atoms::einval()
}

pub(crate) fn binary<'a>(env: Env<'a>, bytes: &[u8]) -> Term<'a> {
    rustler::NewBinary::from_slice(env, bytes).into()
}

/// A list.
pub(crate) fn binaries<'a>(env: Env<'a>, all: &[impl AsRef<[u8]>]) -> Term<'a> {
    let all: Vec<_> = all.iter().map(|one| binary(env, one.as_ref())).collect();
    all.encode(env)
}

/// The TLS alert in a CRYPTO_ERROR (RFC 9001, section 4.8).
pub(crate) fn alert(code: TransportErrorCode) -> Option<Atom> {
    let code = u64::from(code);
    if !(0x100..0x200).contains(&code) {
        return None;
    }
    Some(match code & 0xff {
        0 => atoms::close_notify(),
        10 => atoms::unexpected_message(),
        20 => atoms::bad_record_mac(),
        22 => atoms::record_overflow(),
        40 => atoms::handshake_failure(),
        42 => atoms::bad_certificate(),
        43 => atoms::unsupported_certificate(),
        44 => atoms::certificate_revoked(),
        45 => atoms::certificate_expired(),
        46 => atoms::certificate_unknown(),
        47 => atoms::illegal_parameter(),
        48 => atoms::unknown_ca(),
        49 => atoms::access_denied(),
        50 => atoms::decode_error(),
        51 => atoms::decrypt_error(),
        70 => atoms::protocol_version(),
        71 => atoms::insufficient_security(),
        80 => atoms::internal_error(),
        86 => atoms::inappropriate_fallback(),
        90 => atoms::user_canceled(),
        109 => atoms::missing_extension(),
        110 => atoms::unsupported_extension(),
        112 => atoms::unrecognized_name(),
        113 => atoms::bad_certificate_status_response(),
        115 => atoms::unknown_psk_identity(),
        116 => atoms::certificate_required(),
        120 => atoms::no_application_protocol(),
        _ => atoms::unknown(),
    })
}

fn transport_code(code: TransportErrorCode) -> Atom {
    match u64::from(code) {
        0x0 => atoms::no_error(),
        0x1 => atoms::internal_error(),
        0x2 => atoms::connection_refused(),
        0x3 => atoms::flow_control_error(),
        0x4 => atoms::stream_limit_error(),
        0x5 => atoms::stream_state_error(),
        0x6 => atoms::final_size_error(),
        0x7 => atoms::frame_encoding_error(),
        0x8 => atoms::transport_parameter_error(),
        0x9 => atoms::connection_id_limit_error(),
        0xa => atoms::protocol_violation(),
        0xb => atoms::invalid_token(),
        0xc => atoms::application_error(),
        0xd => atoms::crypto_buffer_exceeded(),
        0xe => atoms::key_update_error(),
        0xf => atoms::aead_limit_reached(),
        0x10 => atoms::no_viable_path(),
        _ => atoms::unknown(),
    }
}
