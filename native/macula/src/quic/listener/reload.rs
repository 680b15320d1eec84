//! What new connections of a listener get is changed while the listener serves.

use std::sync::Arc;

use crate::engine::transport::{ServerConfig, TransportConfig};
use rustler::types::atom;
use rustler::{Atom, Binary, Encoder, Env, NifMap, NifResult, ResourceArc, Term};
use rustls::pki_types::CertificateDer;

use super::{Handle, Host, Hosts, copied};
use crate::quic::options;
use crate::tls::resumption::server::Resumption;
use crate::tls::session::Noticing;
use crate::tls::shown::Shown;
use crate::tls::{self, TlsError, VerifyClient, key_log, lean, watched};
use crate::vm::messages::atoms;
use crate::vm::reply::Reply;

/// What a listener shows and whom it trusts, which can change while it serves.
pub(super) struct Changeable {
    pub(super) shown: Shown,
    pub(super) client: VerifyClient,
    /// A process decides about clients' certificates.
    pub(super) defers: bool,
    pub(super) alpn: Vec<Vec<u8>>,
    pub(super) secrets: key_log::Secrets,
    /// For connections whose clients are asked for certificates.
    pub(super) asking: Arc<TransportConfig>,
    /// What stays, such as the key of address tokens: those that are under way must still count.
    pub(super) server: ServerConfig,
}

/// What is to be changed, copied out of the VM.
pub(super) struct Reload {
    credentials: Option<Result<tls::Credentials, TlsError>>,
    hosts: Option<Hosts>,
    asks: Option<bool>,
    requires: Option<bool>,
    roots: Option<Vec<CertificateDer<'static>>>,
    alpn: Option<Vec<Vec<u8>>>,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum ReloadError {
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("no certificates are given that clients could be verified with")]
    NoRoots,
    #[error("a certificate cannot be required where none is asked for")]
    NotAsked,
    #[error("sessions are resumed, which needs no certificate")]
    Resumes,
    #[error("internal error")]
    Internal,
}

impl Encoder for ReloadError {
    fn encode<'a>(&self, env: Env<'a>) -> Term<'a> {
        let needs = |key: Atom, why: Atom, other: Atom| {
            (atoms::bad_option(), key, (why, other)).encode(env)
        };
        match self {
            ReloadError::Tls(error) => error.encode(env),
            ReloadError::NoRoots => needs(names::verify(), names::needs(), names::cacertfile()),
            ReloadError::NotAsked => needs(
                names::fail_if_no_peer_cert(),
                names::needs(),
                names::verify_peer(),
            ),
            ReloadError::Resumes => needs(names::verify(), names::excludes(), names::resumption()),
            ReloadError::Internal => atoms::internal_error().encode(env),
        }
    }
}

mod names {
    rustler::atoms! {
        verify, verify_peer, needs, excludes, cacertfile, fail_if_no_peer_cert, resumption,
    }
}

impl Changeable {
    /// What new connections get from now on. Where anything is wrong, nothing changes.
    pub(super) fn reload(
        &mut self,
        reload: Reload,
        resumption: &Resumption,
    ) -> Result<ServerConfig, ReloadError> {
        let client = self.client_after(&reload)?;
        let asks = !matches!(client, VerifyClient::No);
        if asks && !matches!(resumption, Resumption::Never) {
            return Err(ReloadError::Resumes);
        }
        let shown = self
            .shown
            .changed(reload.credentials.transpose()?, reload.hosts.transpose()?)?;
        let tls = tls::server_config(
            &shown,
            client.clone(),
            self.defers,
            reload.alpn.as_ref().unwrap_or(&self.alpn).clone(),
            &self.secrets,
            resumption,
        )?;
        let tls = lean::Server::new(tls).map_err(|_| ReloadError::Internal)?;
        let mut server = self.server.clone();
        server.crypto = Arc::new(watched::Server::<_, Noticing>::new(tls));
        if asks {
            server.transport = self.asking.clone();
        }
        (self.shown, self.client) = (shown, client);
        if let Some(alpn) = reload.alpn {
            self.alpn = alpn;
        }
        Ok(server)
    }

    fn client_after(&self, reload: &Reload) -> Result<VerifyClient, ReloadError> {
        let (asked, required, roots) = match &self.client {
            VerifyClient::No => (false, false, None),
            VerifyClient::Optional(roots) => (true, false, Some(roots)),
            VerifyClient::Required(roots) => (true, true, Some(roots)),
        };
        let asks = reload.asks.unwrap_or(asked);
        let requires = reload.requires.unwrap_or(asks && required);
        match (asks, requires, reload.roots.as_ref().or(roots)) {
            (false, false, _) => Ok(VerifyClient::No),
            (false, true, _) => Err(ReloadError::NotAsked),
            (true, false, None) if self.defers => Ok(VerifyClient::Optional(Vec::new())),
            (true, true, None) if self.defers => Ok(VerifyClient::Required(Vec::new())),
            (true, _, None) => Err(ReloadError::NoRoots),
            (true, false, Some(roots)) => Ok(VerifyClient::Optional(roots.clone())),
            (true, true, Some(roots)) => Ok(VerifyClient::Required(roots.clone())),
        }
    }
}

/// Options that are empty, or `keep`, change nothing.
#[derive(NifMap)]
struct ReloadOptions<'a> {
    cert: Vec<Binary<'a>>,
    key_kind: Atom,
    key: Binary<'a>,
    sni_hosts: Term<'a>,
    verify: Atom,
    required: Atom,
    cacerts: Vec<Binary<'a>>,
    alpn: Vec<Binary<'a>>,
}

/// Changes what new connections get. Established ones, and datagrams, do not notice.
#[rustler::nif]
fn listener_reload<'a>(
    env: Env<'a>,
    handle: ResourceArc<Handle>,
    reference: Term<'a>,
    options: ReloadOptions<'a>,
) -> NifResult<Term<'a>> {
    let choice = |atom: Atom| match atom {
        yes if yes == atom::true_() => Some(true),
        no if no == atom::false_() => Some(false),
        _ => None,
    };
    let roots = options::certificates(&options.cacerts);
    let reload = Reload {
        credentials: (!options.cert.is_empty())
            .then(|| options::credentials(&options.cert, options.key_kind, &options.key)),
        hosts: match options.sni_hosts.decode::<Vec<Host>>() {
            Ok(hosts) => Some(copied(&hosts)),
            Err(_) if options.sni_hosts.is_atom() => None,
            Err(error) => return Err(error),
        },
        asks: choice(options.verify),
        requires: choice(options.required),
        roots: (!roots.is_empty()).then_some(roots),
        alpn: (!options.alpn.is_empty())
            .then(|| options.alpn.iter().map(|p| p.as_slice().to_vec()).collect()),
    };
    let listener = &handle.0;
    let mut state = listener.lock();
    if state.stopping {
        return Ok((atoms::error(), atoms::closed()).encode(env));
    }
    let (reply, operation) = Reply::new(env, reference);
    state.reloads.push((reload, reply));
    drop(state);
    listener.changed.notify_one();
    Ok((atoms::ok(), operation).encode(env))
}
