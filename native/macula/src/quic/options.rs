//! The options as they come from `macula_quic_options`, which has checked every one of them.

use std::sync::Arc;
use std::time::Duration;

use quinn::congestion::{BbrConfig, CubicConfig, NewRenoConfig};
use quinn::{IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};
use rustler::{Atom, Binary, NifMap};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use crate::tls::{Credentials, TlsError};

rustler::atoms! { cubic, bbr, new_reno, pkcs8 }

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
    initial_rtt: u64,
    min_mtu: u16,
    initial_mtu: u16,
    pub(crate) max_mtu: u16,
    datagram_receive_buffer: u64,
    datagram_send_buffer: u64,
}

impl Transport {
    pub(crate) fn config(&self) -> Arc<TransportConfig> {
        let mut config = TransportConfig::default();
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
            .receive_window(varint(self.receive_window))
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
            discovery.upper_bound(self.max_mtu);
            discovery
        }));
        if self.congestion_control == bbr() {
            config.congestion_controller_factory(Arc::new(BbrConfig::default()));
        } else if self.congestion_control == new_reno() {
            let mut reno = NewRenoConfig::default();
            reno.initial_window(self.initial_window());
            config.congestion_controller_factory(Arc::new(reno));
        } else {
            let mut cubic = CubicConfig::default();
            cubic.initial_window(self.initial_window());
            config.congestion_controller_factory(Arc::new(cubic));
        }
        Arc::new(config)
    }

    /// As RFC 9002 (section 7.2) has it. Quinn's default knows only datagrams of 1200 bytes, and lets
    /// none go that is larger than the whole window.
    fn initial_window(&self) -> u64 {
        let datagram = u64::from(self.initial_mtu);
        14720.clamp(2 * datagram, 10 * datagram)
    }
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
