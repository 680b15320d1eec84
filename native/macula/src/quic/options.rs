//! The options as they come from `macula_quic_options`, which has checked every one of them.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::engine::transport::{IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};
use quinn_proto::congestion::{BbrConfig, ControllerFactory, CubicConfig, NewRenoConfig};
use rustler::{Atom, Binary, NifMap};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use crate::engine::opening::Opening;
use crate::engine::parting::Parting;
use crate::quic::congestion::ForgetfulConfig;
use crate::tls::key_log;
use crate::tls::{Credentials, TlsError};

rustler::atoms! { cubic, bbr, new_reno, pkcs8 }

/// The largest message of a TLS handshake, which is a chain of certificates. All of one may wait for its
/// first packet; Quinn takes a quarter by default.
const CHAIN: usize = 64 * 1024;

#[derive(NifMap)]
pub(crate) struct Transport {
    idle_timeout: u64,
    keep_alive: u64,
    bidi_streams: u64,
    uni_streams: u64,
    stream_receive_window: u64,
    receive_window: u64,
    pub(crate) send_window: u64,
    congestion_control: Atom,
    /// In datagrams; 0 is what RFC 9002 says.
    initial_window: u64,
    /// In milliseconds; 0 is never.
    send_idle_timeout: u64,
    /// In microseconds.
    mtu_discovery_interval: u64,
    initial_rtt: u64,
    min_mtu: u16,
    initial_mtu: u16,
    pub(crate) max_mtu: u16,
    datagram_receive_buffer: u64,
    datagram_send_buffer: u64,
    /// Where logs go; empty is nowhere.
    qlog_dir: String,
}

impl Transport {
    /// The directory in which each connection is to have its log.
    pub(crate) fn qlog_dir(&self) -> Option<&str> {
        (!self.qlog_dir.is_empty()).then_some(&self.qlog_dir)
    }

    /// The streams of the peer that may be open at a time, bidirectional and unidirectional ones.
    pub(crate) fn streams(&self) -> [u64; 2] {
        [self.bidi_streams, self.uni_streams]
    }

    /// What the peer may send ahead of its being read, all streams together.
    pub(crate) fn receive_window(&self) -> u64 {
        self.receive_window
    }

    /// `asks`: certificates of the peer are to come. The peer may send so much at first.
    pub(crate) fn config(&self, asks: bool, first_window: u64) -> Arc<TransportConfig> {
        let mut config = TransportConfig::default();
        if asks {
            config.crypto_buffer_size(CHAIN);
        }
        let idle = Duration::from_millis(self.idle_timeout);
        config
            .max_idle_timeout(
                (!idle.is_zero())
                    .then(|| IdleTimeout::try_from(idle).ok())
                    .flatten(),
            )
            .keep_alive_interval(
                (self.keep_alive > 0).then(|| Duration::from_millis(self.keep_alive)),
            )
            .max_concurrent_bidi_streams(varint(self.bidi_streams))
            .max_concurrent_uni_streams(varint(self.uni_streams))
            .stream_receive_window(varint(self.stream_receive_window))
            .receive_window(varint(first_window))
            .send_window(self.send_window)
            .initial_rtt(Duration::from_millis(self.initial_rtt))
            .min_mtu(self.min_mtu)
            .initial_mtu(self.initial_mtu)
            .datagram_receive_buffer_size(
                (self.datagram_receive_buffer > 0)
                    .then(|| usize::try_from(self.datagram_receive_buffer).unwrap_or(usize::MAX)),
            )
            .datagram_send_buffer_size(
                usize::try_from(self.datagram_send_buffer).unwrap_or(usize::MAX),
            );
        config.mtu_discovery_config((self.max_mtu > self.initial_mtu).then(|| {
            let mut discovery = MtuDiscoveryConfig::default();
            discovery
                .upper_bound(self.max_mtu)
                .interval(Duration::from_micros(self.mtu_discovery_interval));
            discovery
        }));
        let controllers = self.controllers();
        config.congestion_controller_factory(Arc::new(Parting(if self.send_idle_timeout > 0 {
            Arc::new(ForgetfulConfig {
                controllers,
                after: Duration::from_millis(self.send_idle_timeout),
            })
        } else {
            controllers
        })));
        Arc::new(config)
    }

    fn controllers(&self) -> Arc<dyn ControllerFactory + Send + Sync> {
        if self.congestion_control == bbr() {
            let mut bbr = BbrConfig::default();
            if self.initial_window > 0 {
                bbr.initial_window(self.initial_window());
            }
            Arc::new(Opening::new(bbr))
        } else if self.congestion_control == new_reno() {
            let mut reno = NewRenoConfig::default();
            reno.initial_window(self.initial_window());
            Arc::new(Opening::new(reno))
        } else {
            let mut cubic = CubicConfig::default();
            cubic.initial_window(self.initial_window());
            Arc::new(Opening::new(cubic))
        }
    }

    /// So many datagrams, or as RFC 9002 (section 7.2) has it. Quinn's default knows only datagrams of 1200 bytes, and lets
    /// none go that is larger than the whole window.
    fn initial_window(&self) -> u64 {
        let datagram = u64::from(self.initial_mtu);
        if self.initial_window > 0 {
            return self.initial_window.saturating_mul(datagram);
        }
        14720.clamp(2 * datagram, 10 * datagram)
    }
}

/// Where the secrets of connections are to go.
pub(crate) enum Secrets {
    Known(key_log::Secrets),
    /// To this file, which is opened where waiting for it is no harm.
    File(String),
}

impl Secrets {
    /// To a file if one is named, else to that of the environment if that is wanted.
    pub(crate) fn new(environment: bool, file: String) -> Self {
        match (environment, file.is_empty()) {
            (_, false) => Secrets::File(file),
            (true, true) => Secrets::Known(key_log::Secrets::Environment),
            (false, true) => Secrets::Known(key_log::Secrets::Nowhere),
        }
    }

    /// Whether no file is to be opened.
    pub(crate) fn go_nowhere(&self) -> bool {
        matches!(self, Secrets::Known(key_log::Secrets::Nowhere))
    }

    pub(crate) fn open(self) -> Result<key_log::Secrets, TlsError> {
        match self {
            Secrets::Known(secrets) => Ok(secrets),
            Secrets::File(file) => {
                key_log::Secrets::file(Path::new(&file)).map_err(TlsError::Secrets)
            }
        }
    }
}

/// In milliseconds; 0 is for ever.
pub(crate) fn patience(milliseconds: u64) -> Option<Duration> {
    (milliseconds > 0).then(|| Duration::from_millis(milliseconds))
}

pub(crate) fn varint(value: u64) -> VarInt {
    VarInt::from_u64(value).unwrap_or(VarInt::MAX)
}

/// DER certificates, copied out of the VM.
pub(crate) fn certificates(ders: &[Binary]) -> Vec<CertificateDer<'static>> {
    ders.iter()
        .map(|der| CertificateDer::from(der.as_slice().to_vec()))
        .collect()
}

/// A chain with its key; `kind` says which container the key is in, where the caller knows.
pub(crate) fn credentials(
    chain: &[Binary],
    kind: Atom,
    key: &Binary,
) -> Result<Credentials, TlsError> {
    let der = key.as_slice().to_vec();
    let key = if kind == pkcs8() {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(der))
    } else {
        PrivateKeyDer::try_from(der).map_err(|_| TlsError::Key)?
    };
    Ok(Credentials {
        chain: certificates(chain),
        key,
    })
}
