//! The one place that names what goes over the VM boundary: every atom, and the sending of a
//! message outside of a NIF's own environment. What each message means is in docs/reference/messages.md.

use std::cell::RefCell;

use rustler::thread::is_scheduler_thread;
use rustler::{Encoder, Env, LocalPid, OwnedEnv, Term};

use crate::vm::runtime;

pub(crate) mod atoms {
    rustler::atoms! {
        ok, error, undefined, infinity, busy, wait, now, full, later, drop_oldest,
        // Messages.
        quic, new_conn, new_stream, peer_send_shutdown, peer_send_aborted, peer_receive_aborted,
        stream_closed, send_ready, delivered, passive, shutdown, transport_shutdown, closed,
        listener_stopped, dgram, peer_address_changed,
        // Keys of the maps in messages and results.
        absolute_offset, len, flags, reason, is_conn_shutdown, is_app_closing, is_shutdown_by_app,
        is_closed_remotely, status, conn, remote_addr, peername, sockname,
        negotiated_protocol, server_name, peercert, stream_id, bidirectional, unidirectional,
        direction, initiator, local, peer, owner, active, send_pend, recv_pend, side, client, server,
        cipher, rtt, open_connections, handshakes, handle, listener, connection, stream, link,
        dist_endpoint, place, state,
        open, priority, max_datagram_size, accepted, backlog,
        // Values and reasons.
        normal, once, timeout, reset, aborted, not_owner, noproc, einval, internal_error,
        eaddrinuse, eaddrnotavail, eacces, eafnosupport, eagain, emfile, enetunreach, ehostunreach,
        econnrefused, emsgsize, enoent, eisdir, enotdir,
        application_close, transport_close, transport_error, tls_alert, alpn_mismatch, bad_cert,
        bad_key, bad_option, bad_sni_host, max_path_length_reached, qlog_dir, sslkeylogfile, bad_server_name, version_mismatch, cids_exhausted, stopped, connection_lost, no_peercert,
        protocol_not_negotiated, no_path_mtu, limit, key_mismatch, pubkey_mismatch,
        unsupported, disabled, bad_san, badarg, early_data_rejected,
        // How quicer calls the ends of connections.
        success, connection_idle, ver_neg_error, protocol_error, tls_error,
        // RFC 9000, section 20.1.
        no_error, connection_refused, flow_control_error, stream_limit_error,
        stream_state_error, final_size_error, frame_encoding_error, transport_parameter_error,
        connection_id_limit_error, protocol_violation, invalid_token, application_error,
        crypto_buffer_exceeded, key_update_error, aead_limit_reached, no_viable_path, unknown,
        // TLS alerts, RFC 8446 section 6, as the ssl application names them.
        close_notify, unexpected_message, bad_record_mac, record_overflow, handshake_failure,
        bad_certificate, unsupported_certificate, certificate_revoked, certificate_expired,
        certificate_unknown, illegal_parameter, unknown_ca, access_denied, decode_error,
        decrypt_error, protocol_version, insufficient_security, inappropriate_fallback,
        user_canceled, missing_extension, unsupported_extension, unrecognized_name,
        bad_certificate_status_response, unknown_psk_identity, certificate_required,
        no_application_protocol,
        // Certificate failures.
        selfsigned_peer, not_yet_valid, hostname_check_failed, invalid_signature, invalid_purpose,
        bad_encoding, unknown_revocation_status,
    }
}

thread_local! {
    // One environment a thread: making one for each message would cost more than the message.
    static ENV: RefCell<OwnedEnv> = RefCell::new(OwnedEnv::new());
}

/// The receiver of a message is dead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Gone;

/// Sends a message. Without a message to send, because what it would name is gone, nothing is sent.
pub(crate) fn send<F>(to: &LocalPid, build: F) -> Result<(), Gone>
where
    F: for<'a> FnOnce(Env<'a>) -> Option<Term<'a>>,
{
    ENV.with(|env| match env.try_borrow_mut() {
        Ok(mut env) => send_in(&mut env, to, build),
        // A build that sends in turn: it gets an environment of its own.
        Err(_) => send_in(&mut OwnedEnv::new(), to, build),
    })
}

fn send_in<F>(env: &mut OwnedEnv, to: &LocalPid, build: F) -> Result<(), Gone>
where
    F: for<'a> FnOnce(Env<'a>) -> Option<Term<'a>>,
{
    let Some(message) = env.run(|env| build(env).map(|term| term.as_c_arg())) else {
        env.clear();
        return Err(Gone);
    };
    // SAFETY: the term was made in this very environment.
    dispatch(env, to, |env| unsafe { Term::new(env, message) })
}

/// Builds a message in an environment of its own, sends it and clears the environment. The only way to
/// send out of such an environment: on its own threads the VM wants that of the calling process, and
/// what has none, a destructor or a visit of the distribution's driver, leaves the message to a native
/// thread.
#[expect(clippy::disallowed_methods)]
pub(crate) fn dispatch<F>(env: &mut OwnedEnv, to: &LocalPid, build: F) -> Result<(), Gone>
where
    F: for<'a> FnOnce(Env<'a>) -> Term<'a>,
{
    if !is_scheduler_thread() {
        return env.send_and_clear(to, build).map_err(|_| Gone);
    }
    let message = env.run(|env| build(env).as_c_arg());
    let (mut env, to) = (std::mem::replace(env, OwnedEnv::new()), *to);
    if !env.run(|env| to.is_alive(env)) {
        return Err(Gone);
    }
    let native = runtime::running().ok_or(Gone)?;
    native.start(async move {
        // Who has died meanwhile needs no message.
        // SAFETY: the term was made in this very environment.
        let _ = env.send_and_clear(&to, |env| unsafe { Term::new(env, message) });
    });
    Ok(())
}

/// The count for which an owner asked is spent.
pub(crate) fn passive<'a>(env: Env<'a>, handle: Term<'a>, _owner: LocalPid) -> Option<Term<'a>> {
    Some(event(env, atoms::passive(), handle, atoms::undefined()))
}

/// `{quic, Tag, Handle, Detail}`, or `{quic, Data, Handle, Flags}`.
pub(crate) fn event<'a>(
    env: Env<'a>,
    tag: impl Encoder,
    handle: Term<'a>,
    detail: impl Encoder,
) -> Term<'a> {
    (atoms::quic(), tag, handle, detail).encode(env)
}
